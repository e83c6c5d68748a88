"""What is written is the moment at which the snapshot was taken, with all that further owners add to it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from cvft.checkpoint import INFO_FILE, State, load_model, read_state, verify_checkpoint
from cvft.errors import CheckpointError
from cvft.snapshot import save_checkpoint, take_snapshot, write_snapshot
from tests.cvft.test_checkpoint import INFO, network, optimizer_of, train


def test_training_that_goes_on_does_not_change_what_will_be_written(tmp_path):
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    seen = [0.5]
    states = {"curve": State(values={"seen": seen}, tensors={"losses": torch.ones(2, dtype=torch.float64)})}
    options = {"model": model, "optimizer": optimizer, "states": states}
    info = dataclasses.replace(INFO, training={"seen": seen})
    save_checkpoint(tmp_path / "at once", info=info, **options)
    snapshot = take_snapshot(info=info, **options)
    train(model, optimizer, range(2, 4))
    states["curve"].tensors["losses"].zero_()
    seen.append(0.25)
    write_snapshot(tmp_path / "later", snapshot)
    files = sorted(path.name for path in (tmp_path / "later").iterdir())
    assert files == ["checkpoint.json", "model.safetensors", "state-curve.safetensors", "training.safetensors"]
    assert all((tmp_path / "later" / name).read_bytes() == (tmp_path / "at once" / name).read_bytes() for name in files)


def test_an_owners_state_comes_back_exactly(tmp_path):
    state = State(
        values={"epoch": 3, "none": None},
        tensors={"rows": torch.arange(6, dtype=torch.int32).view(2, 3), "empty": torch.empty(0, dtype=torch.float64)},
    )
    states = {"neighbours": state, "plain": State(values={"a": 1})}
    save_checkpoint(tmp_path / "last", model=network(), info=INFO, states=states)
    found = read_state(tmp_path / "last", "neighbours")
    assert found.values == state.values
    assert found.tensors.keys() == state.tensors.keys()
    for name, tensor in state.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert read_state(tmp_path / "last", "plain") == states["plain"]
    assert read_state(tmp_path / "last", "ema") is None


def test_weights_that_stand_for_the_networks_own_are_what_is_loaded(tmp_path):
    model = network()
    average = {name: tensor / 2 for name, tensor in model.state_dict().items()}
    write_snapshot(tmp_path / "last", take_snapshot(model=model, info=INFO, weights=average))
    state = load_model(tmp_path / "last")[0].state_dict()
    assert all(torch.equal(state[name], average[name]) for name in average)


def test_a_flipped_bit_anywhere_is_found(tmp_path):
    directory = tmp_path / "last"
    states = {"curve": State(tensors={"losses": torch.ones(4, dtype=torch.float64)})}
    model = network()
    save_checkpoint(directory, model=model, info=INFO, optimizer=optimizer_of(model), states=states)
    verify_checkpoint(directory)
    generator = torch.Generator().manual_seed(0)
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        for position in torch.randint(len(data), (40,), generator=generator).tolist():
            bit = 1 << int(torch.randint(8, (1,), generator=generator))
            path.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
            # What JSON ignores, a space for a line's end, changes nothing that is read.
            if path.name == INFO_FILE and _reads_the_same(path.read_bytes(), data):
                continue
            with pytest.raises(CheckpointError, match=path.name):
                verify_checkpoint(directory)
        path.write_bytes(data)
    verify_checkpoint(directory)


def _reads_the_same(changed: bytes, data: bytes) -> bool:
    try:
        return json.loads(changed) == json.loads(data)
    except ValueError:
        return False


def test_a_guard_that_raises_leaves_what_was_there(tmp_path):
    save_checkpoint(tmp_path / "last", model=network(), info=INFO)

    def refuse() -> None:
        raise CheckpointError("another one writes here")

    newer = take_snapshot(model=network(), info=dataclasses.replace(INFO, step=8))
    with pytest.raises(CheckpointError, match="another one"):
        write_snapshot(tmp_path / "last", newer, guard=refuse)
    assert load_model(tmp_path / "last")[1] == INFO
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
