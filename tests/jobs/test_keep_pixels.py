"""A training whose pixels stay in memory is the training that decodes them every time."""

from __future__ import annotations

import safetensors.torch
import torch

from jobs import worker
from jobs.saving import checkpoints_of


def trained(config) -> dict[str, torch.Tensor]:
    worker.train(config, device=torch.device("cpu"), on_epoch=lambda metrics: None)
    checkpoints = checkpoints_of(config)
    folder = checkpoints.uri(checkpoints.names()[-1])
    return safetensors.torch.load_file(f"{folder}/model.safetensors")


def test_weights_are_the_same_to_the_bit(tiny):
    decoded, kept = (
        trained(tiny(f"name={keep}", f"data.keep_pixels={keep}", "train.num_epochs=2")) for keep in ("never", "host")
    )
    assert decoded.keys() == kept.keys()
    assert all(torch.equal(decoded[name], kept[name]) for name in decoded)
