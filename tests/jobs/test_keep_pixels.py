"""A training whose pixels stay in memory is the training that decodes them every time."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from cvft.errors import ConfigError
from jobs.training import worker
from jobs.training.saving import checkpoints_of
from pipeline import kept_pixels


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


def test_splits_that_fit_alone_but_not_together_are_refused_at_the_start(tiny, monkeypatch):
    # 12 and 4 pairs of 32 x 176 and 64 x 64 pixels: 350 and 117 kB.
    monkeypatch.setattr(kept_pixels, "free_bytes", lambda device: 400_000)
    with pytest.raises(ConfigError, match=r"data.keep_pixels: splits 'train' and 'val' together take 0.0 GB"):
        trained(tiny("data.keep_pixels=host"))
    trained(tiny("data.keep_pixels=never", "train.num_epochs=1"))
