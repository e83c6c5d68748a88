"""A training's checkpoints are listed by age, copied once and deleted, in a folder and in an object store alike."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cvft.checkpoint import CheckpointInfo, read_info, restore_training
from cvft.config import BackboneConfig, HeadConfig, ModelConfig, PreprocessConfig, TransportConfig
from cvft.errors import CheckpointError
from cvft.model import CrossViewModel, build_model
from cvft.snapshot import Snapshot, take_snapshot
from pipeline.checkpoints import CheckpointFolder, checkpoint_name, fetch
from pipeline.storage import Store

PREPROCESS = PreprocessConfig(ground_size_px=(16, 48), aerial_size_px=(32, 32))
CONFIG = ModelConfig(
    backbone=BackboneConfig(blocks=(1, 1), width=1 / 16, num_frozen_blocks=0),
    head=HeadConfig(channels=4, grid=(8, 8), transport=TransportConfig(init="zero")),
)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.objectstore)])
def uri(request, tmp_path) -> str:
    return str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("s3_uri")


@pytest.fixture
def model() -> CrossViewModel:
    torch.manual_seed(0)
    return build_model(CONFIG, PREPROCESS)


def snapshot(model: CrossViewModel, step: int) -> Snapshot:
    info = CheckpointInfo(model=CONFIG, preprocess=PREPROCESS, step=step)
    return take_snapshot(model=model, info=info, optimizer=torch.optim.Adam(model.parameters()))


def save(folder: CheckpointFolder, model: CrossViewModel, *steps: int) -> list[str]:
    for step in steps:
        folder.write(checkpoint_name(step), snapshot(model, step))
    return [checkpoint_name(step) for step in steps]


def test_saved_checkpoint_comes_back_whole(uri, model, tmp_path):
    folder = CheckpointFolder(uri)
    (name,) = save(folder, model, 3)
    directory = fetch(folder.uri(name), cache=tmp_path / "cache")
    torch.manual_seed(1)
    other = build_model(CONFIG, PREPROCESS)
    info = restore_training(
        directory, model=other, preprocess=PREPROCESS, optimizer=torch.optim.Adam(other.parameters())
    )
    assert info.step == 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), other.parameters(), strict=True))


def test_names_are_sorted_by_step(uri, model):
    folder = CheckpointFolder(uri)
    assert folder.names() == []
    save(folder, model, 100_000_000, 9999, 2)
    assert folder.names() == ["step-00000002", "step-00009999", "step-100000000"]


def test_what_is_not_whole_or_not_ours_does_not_count(uri, model):
    folder, store = CheckpointFolder(uri), Store.from_uri(uri)
    save(folder, model, 1)
    for path in ("step-00000002/model.safetensors", ".step-00000003.7.tmp/checkpoint.json", "mine/checkpoint.json"):
        store.write_bytes(path, b"{}")
    assert folder.names() == ["step-00000001"]


def test_all_others_than_those_kept_are_deleted(uri, model):
    folder = CheckpointFolder(uri)
    save(folder, model, 1, 2, 3)
    folder.keep({"step-00000002"})
    assert folder.names() == ["step-00000002"]
    assert {path.partition("/")[0] for path in Store.from_uri(uri).list()} == {"step-00000002"}


def test_place_without_a_checkpoint_is_told(uri, tmp_path):
    Store.from_uri(uri).write_bytes("step-00000001/model.safetensors", b"half of one")
    for name in ("step-00000001", "step-00000002"):
        with pytest.raises(CheckpointError, match=rf"{name}: no checkpoint here \(checkpoint\.json is missing\)"):
            fetch(CheckpointFolder(uri).uri(name), cache=tmp_path / "cache")


def test_local_checkpoint_is_used_where_it_is(model, tmp_path):
    folder = CheckpointFolder(str(tmp_path / "run"))
    (name,) = save(folder, model, 1)
    assert fetch(folder.uri(name), cache=tmp_path / "cache") == tmp_path / "run" / name
    assert not (tmp_path / "cache").exists()


@pytest.mark.objectstore
def test_racing_copies_end_with_one_and_nothing_beside(s3_uri, model, tmp_path, monkeypatch):
    folder = CheckpointFolder(s3_uri)
    (name,) = save(folder, model, 1)
    both_have_copied = threading.Barrier(2)
    rename = Path.rename

    def rename_together(path: Path, target: Path) -> Path:
        both_have_copied.wait(30)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_together)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: fetch(folder.uri(name), cache=tmp_path / "cache"), range(2))
    assert first == second
    assert list((tmp_path / "cache/checkpoints").iterdir()) == [first]
    assert read_info(first).step == 1
    assert fetch(folder.uri(name), cache=tmp_path / "cache") == first  # without another copy: nothing waits


@pytest.mark.objectstore
def test_cache_that_cannot_be_written_is_told(s3_uri, model, tmp_path):
    folder = CheckpointFolder(s3_uri)
    (name,) = save(folder, model, 1)
    (tmp_path / "cache").write_bytes(b"a file")
    with pytest.raises(CheckpointError, match="cannot keep a copy of s3://"):
        fetch(folder.uri(name), cache=tmp_path / "cache")
