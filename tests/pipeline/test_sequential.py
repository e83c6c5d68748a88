"""One pass over the shards gives the batches that random access gives, or an error that names the shard."""

from __future__ import annotations

import contextlib
import io
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cvft.config import PreprocessConfig
from cvft.errors import ConfigError, DataError, ShardError, StoreError
from pipeline import sequential
from pipeline.dataset import PairDataset
from pipeline.loader import Loader
from pipeline.manifest import Manifest
from pipeline.storage import Store

PREPROCESS = PreprocessConfig(ground_size_px=(28, 154), aerial_size_px=(64, 64))


@pytest.fixture
def manifest(cvusa, tmp_path, make_shards) -> Manifest:
    return make_shards(cvusa, str(tmp_path / "store"))


def assert_same_batches(manifest: Manifest, split: str, **options: int) -> None:
    dataset = PairDataset(manifest, split, access="sparse")
    direct = PairDataset(Manifest.load(manifest.uri), split)
    expected = Loader(direct, preprocess=PREPROCESS, batch_size=options["batch_size"]).eval_batches()
    found = sequential.eval_batches(dataset, preprocess=PREPROCESS, **options)
    for left, right in zip(found, expected, strict=True):
        assert left.num_valid == right.num_valid
        for name in ("ground", "aerial", "index", "location_m"):
            assert torch.equal(getattr(left, name), getattr(right, name)), name


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("batch_size", [1, 4, 5, 16])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_batches_are_those_of_the_loader(manifest, split, batch_size, num_threads):
    assert_same_batches(manifest, split, batch_size=batch_size, num_threads=num_threads)


@pytest.mark.objectstore
def test_remote_batches_are_those_of_the_loader(cvusa, s3_uri, make_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert_same_batches(make_shards(cvusa, s3_uri), "train", batch_size=4)


def rewrite(manifest: Manifest, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> str:
    """Write the second training shard anew with other members; return its name."""
    name = manifest.shards[1].name
    path = Store.from_uri(manifest.store_uri).local_path(name)
    with tarfile.open(path) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in change(members):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return name


def first_key(manifest: Manifest) -> str:
    return manifest.pairs.filter(manifest.pairs["shard"].to_numpy() == 1)["key"][0].as_py()


def other_image(data: bytes) -> bytes:
    return data[:-1] + b"\0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[1:], "where the manifest has key {key} stands {key} with aerial.jpg, json"),
        (lambda m: m[:-3], "lacks key "),
        (lambda m: [*m[:3], *m[6:]], "where the manifest has key "),
        (lambda m: [*m, ("more.ground.jpg", b"x")], "holds more pairs than the manifest says"),
        (
            lambda m: [*m[:3], (m[0][0].replace("jpg", "txt"), b"x"), *m[3:]],
            "stands {key} with ground.jpg, aerial.jpg,",
        ),
        (lambda m: [m[0], *m], "the tar is damaged"),
        (lambda m: [*m[3:6], *m[:3], *m[6:]], "where the manifest has key {key} stands "),
        (lambda m: [(m[0][0], other_image(m[0][1])), *m[1:]], ", key {key}: the ground image's bytes have changed"),
        (lambda m: [*m[:2], (m[2][0], b"{{}}"), *m[3:]], "is not the shard that the manifest describes"),
    ],
    ids=["no member", "no pair", "no pair within", "surplus pair", "surplus member", "doubled", "order", "bit", "json"],
)
def test_shard_with_other_members_is_refused_by_name(manifest, change, message):
    dataset = PairDataset(manifest, "train")
    name = rewrite(manifest, change)
    expected = message.format(key=first_key(manifest))
    with pytest.raises(ShardError) as caught:
        list(sequential.read_pairs(manifest, "train"))
    assert name in str(caught.value)
    assert expected in str(caught.value)
    with pytest.raises(ShardError, match=name):
        list(sequential.eval_batches(dataset, preprocess=PREPROCESS, batch_size=4))


def damaged(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "twice":
        path.write_bytes(data + data)
    else:
        path.write_bytes(data[: {"in a member": 3000, "at a member": 512 * 40, "end": len(data) - 5120}[how]])


@pytest.mark.parametrize("how", ["in a member", "at a member", "end", "twice"])
def test_truncated_or_joined_tar_is_refused_by_name(manifest, how):
    name = manifest.shards[2].name
    damaged(Store.from_uri(manifest.store_uri).local_path(name), how)
    with pytest.raises(ShardError, match=name):
        list(sequential.read_pairs(manifest, "train"))


def test_bytes_that_are_no_tar_are_refused_by_name(manifest):
    path = Store.from_uri(manifest.store_uri).local_path(manifest.shards[0].name)
    path.write_bytes(b"not a tar" * 1000)
    with pytest.raises(ShardError, match=r"train-00000.tar: the tar is damaged"):
        list(sequential.read_pairs(manifest, "train"))


class FailingStream:
    def __init__(self, data: bytes) -> None:
        self._stream = io.BytesIO(data)

    def read(self, num_bytes: int) -> bytes:
        if self._stream.tell() > 20_000:
            raise StoreError("s3://bucket/shard.tar: cannot read it: connection reset")
        return self._stream.read(min(num_bytes, 10_000))


def test_error_of_the_store_in_the_middle_of_a_shard_keeps_its_message(manifest, monkeypatch):
    data = Store.from_uri(manifest.store_uri).read_bytes(manifest.shards[0].name)
    monkeypatch.setattr(Store, "open_input", lambda *_: contextlib.nullcontext(FailingStream(data)))
    with pytest.raises(StoreError) as caught:
        list(sequential.read_pairs(manifest, "train"))
    assert str(caught.value) == "s3://bucket/shard.tar: cannot read it: connection reset"


def test_unknown_split_and_bad_numbers_are_refused(manifest):
    dataset = PairDataset(manifest, "train")
    with pytest.raises(DataError, match="it has train, val"):
        list(sequential.read_pairs(manifest, "test"))
    with pytest.raises(ConfigError, match="batch_size: 0 must be at least 1"):
        sequential.eval_batches(dataset, preprocess=PREPROCESS, batch_size=0)
    with pytest.raises(ConfigError, match="num_threads: 0 must be at least 1"):
        sequential.eval_batches(dataset, preprocess=PREPROCESS, batch_size=4, num_threads=0)


def test_pass_that_is_left_early_ends_its_threads(manifest):
    batches = sequential.eval_batches(PairDataset(manifest, "train"), preprocess=PREPROCESS, batch_size=1)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("read", "decode"))]
