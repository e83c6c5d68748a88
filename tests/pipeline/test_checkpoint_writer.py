"""Checkpoints are written behind the training's back, in order, and a store that is away holds up nobody."""

from __future__ import annotations

import errno
import os
import threading

import pytest
import torch

from cvft.checkpoint import MODEL_FILE, CheckpointInfo, verify_checkpoint
from cvft.config import BackboneConfig, HeadConfig, ModelConfig, PreprocessConfig
from cvft.errors import CheckpointError, StoreError, StoreUnavailableError, TrainingError
from cvft.model import build_model
from cvft.snapshot import Snapshot, take_snapshot
from pipeline import patience
from pipeline.checkpoint_writer import CheckpointWriter
from pipeline.checkpoints import CheckpointFolder, checkpoint_name, fetch
from pipeline.storage import Store

PREPROCESS = PreprocessConfig(ground_size_px=(16, 48), aerial_size_px=(32, 32))
CONFIG = ModelConfig(
    backbone=BackboneConfig(blocks=(1, 1), width=1 / 16, num_frozen_blocks=0),
    head=HeadConfig(kind="conv", channels=4, grid=(8, 8)),
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(CONFIG, PREPROCESS)


@pytest.fixture
def folder(tmp_path) -> CheckpointFolder:
    return CheckpointFolder(str(tmp_path / "checkpoints"))


def writer_of(folder: CheckpointFolder, **options) -> CheckpointWriter:
    return CheckpointWriter(folder, **{"present": [], "keep_last": 2, "patience_s": 60.0} | options)


def submit(writer: CheckpointWriter, model, step: int, best: int | None = None) -> None:
    writer.submit(checkpoint_name(step), snapshot(model, step), best=checkpoint_name(best) if best else "")


def snapshot(model, step: int) -> Snapshot:
    return take_snapshot(model=model, info=CheckpointInfo(model=CONFIG, preprocess=PREPROCESS, step=step))


def steps(folder: CheckpointFolder) -> list[int]:
    return [int(name.removeprefix("step-")) for name in folder.names()]


def check_for_ever(writer: CheckpointWriter) -> None:
    while True:
        writer.check()


class Gate:
    """A guard that waits until it is opened."""

    def __init__(self) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.opened.wait(60)


class TestKeeping:
    def test_the_last_ones_and_the_best_stay(self, folder, model):
        writer = writer_of(folder)
        for step in range(1, 7):
            submit(writer, model, step, best=2 if step >= 2 else 1)
            writer.finish()
        assert steps(folder) == [2, 5, 6]
        submit(writer, model, 7, best=7)
        writer.finish()
        assert steps(folder) == [6, 7]

    def test_a_damaged_newer_one_goes_and_is_not_counted_among_the_last(self, folder, model):
        for step in (1, 2, 9):
            folder.write(checkpoint_name(step), snapshot(model, step))
        writer = writer_of(folder, present=[checkpoint_name(1), checkpoint_name(2)])
        submit(writer, model, 3)
        writer.finish()
        assert steps(folder) == [2, 3]

    def test_halves_of_dead_writers_never_count_and_go(self, folder, model, tmp_path):
        root = tmp_path / "checkpoints"
        for half in ("step-00000005", ".step-00000006.123.tmp", "mine"):
            (root / half).mkdir(parents=True)
            (root / half / MODEL_FILE).write_bytes(b"half of one")
        assert folder.names() == []
        writer = writer_of(folder)
        submit(writer, model, 1)
        writer.finish()
        assert {path.name for path in root.iterdir()} == {"step-00000001", "mine"}


class TestWaiting:
    def test_a_newer_one_takes_the_place_of_one_that_waits(self, folder, model):
        gate = Gate()
        writer = writer_of(folder, guard=gate)
        submit(writer, model, 1)
        assert gate.reached.wait(60)
        submit(writer, model, 2)
        submit(writer, model, 3)
        assert steps(folder) == []
        gate.opened.set()
        writer.finish()
        assert steps(folder) == [1, 3]

    def test_the_best_one_goes_on_waiting_beside_the_newest(self, folder, model):
        gate = Gate()
        writer = writer_of(folder, guard=gate)
        submit(writer, model, 1)
        assert gate.reached.wait(60)
        submit(writer, model, 2, best=2)
        for step in (3, 4, 5):
            submit(writer, model, step, best=2)
        gate.opened.set()
        writer.finish()
        assert steps(folder) == [2, 5]  # 1 was written and has gone: it is neither the best nor one of the last two


class TestErrors:
    def test_what_goes_wrong_behind_comes_up_in_front(self, model, tmp_path):
        (tmp_path / "file").write_text("no folder")
        writer = writer_of(CheckpointFolder(str(tmp_path / "file")))
        submit(writer, model, 1)
        with pytest.raises(CheckpointError, match=r"cannot write the checkpoint: Not a directory"):
            check_for_ever(writer)
        writer.finish()  # told once

    def test_a_guard_that_raises_stops_both_writing_and_deleting(self, folder, model):
        allowed = 3  # of two calls for each checkpoint

        def guard() -> None:
            nonlocal allowed
            allowed -= 1
            if allowed < 0:
                raise TrainingError("another attempt has taken over")

        writer = writer_of(folder, guard=guard, keep_last=1)
        submit(writer, model, 1)
        writer.finish()
        submit(writer, model, 2)
        with pytest.raises(TrainingError, match="another attempt"):
            writer.finish()
        assert steps(folder) == [1, 2]  # written, nothing deleted
        submit(writer, model, 3)
        with pytest.raises(TrainingError, match="another attempt"):
            writer.finish()
        assert steps(folder) == [1, 2]


@pytest.mark.objectstore
class TestStoreAway:
    def test_it_is_waited_for_and_what_was_saved_meanwhile_is_whole(self, s3_uri, model, s3_proxy, tmp_path, caplog):
        folder = CheckpointFolder(s3_uri)
        writer = writer_of(folder)
        submit(writer, model, 1)
        writer.finish()
        s3_proxy.go_away()
        submit(writer, model, 2)
        while "trying again" not in caplog.text:
            writer.check()
        submit(writer, model, 3)
        submit(writer, model, 4)
        writer.check()
        s3_proxy.come_back()
        writer.finish()
        assert "the server cannot be reached" in caplog.text
        assert "the store is back after" in caplog.text
        assert steps(folder) == [2, 4]
        verify_checkpoint(fetch(folder.uri(checkpoint_name(4)), cache=tmp_path))

    def test_patience_has_an_end(self, s3_uri, model, s3_proxy):
        writer = writer_of(CheckpointFolder(s3_uri), patience_s=0.2)
        s3_proxy.go_away()
        submit(writer, model, 1)
        with pytest.raises(StoreUnavailableError, match="the server cannot be reached"):
            writer.finish()

    def test_what_nobody_but_the_user_can_mend_is_told_at_once(self, s3_uri, model, caplog):
        writer = writer_of(CheckpointFolder("s3://no-such-bucket/run"))
        submit(writer, model, 1)
        with pytest.raises(StoreError, match=r"there is no bucket 'no-such-bucket'; create it"):
            writer.finish()
        assert "trying again" not in caplog.text

    def test_a_damaged_object_is_named_and_the_one_before_it_found(self, s3_uri, model, tmp_path, caplog):
        folder, store = CheckpointFolder(s3_uri), Store.from_uri(s3_uri)
        for step in (1, 2, 3):
            folder.write(checkpoint_name(step), snapshot(model, step))
        data = bytearray(store.read_bytes(f"step-00000003/{MODEL_FILE}"))
        data[-1] ^= 1
        store.write_bytes(f"step-00000003/{MODEL_FILE}", bytes(data))
        store.delete(f"step-00000002/{MODEL_FILE}")
        name, directory = folder.newest_whole(cache=tmp_path)
        assert name == "step-00000001"
        assert "step-00000003 cannot be used" in caplog.text
        assert f"step-00000002/{MODEL_FILE}: is missing; the checkpoint is incomplete" in caplog.text
        flip = bytearray((directory / MODEL_FILE).read_bytes())
        flip[-1] ^= 1
        (directory / MODEL_FILE).write_bytes(flip)  # the copy on this machine: fetched anew
        verify_checkpoint(folder.newest_whole(cache=tmp_path)[1])


@pytest.mark.parametrize(("times", "patience_s"), [(0, 0.0), (3, 60.0)])
def test_patience_calls_again_while_the_store_is_away(times, patience_s, monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)
    failures = iter([StoreUnavailableError("away")] * times)

    def read() -> int:
        for failure in failures:
            raise failure
        return 7

    assert patience.patiently(read, patience_s=patience_s) == 7


def test_a_full_disk_is_not_waited_for_and_a_shared_disk_that_is_away_is(folder, model, monkeypatch):
    for number, kind in ((errno.ENOSPC, CheckpointError), (errno.ESTALE, StoreUnavailableError)):

        def fail(*_, number=number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises((CheckpointError, StoreError)) as caught:
            folder.write(checkpoint_name(1), snapshot(model, 1))
        assert type(caught.value) is kind
        assert os.strerror(number) in str(caught.value)
