"""Two jobs write the same plan at once, with other options: no manifest ever tells of other shards than there are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cvft.errors import ShardError
from pipeline import shard_work
from pipeline.build import BuildOptions, ShardResult, build_shards
from pipeline.manifest import Manifest
from pipeline.plan import Cut
from pipeline.pointer import read_pointer
from pipeline.runner import Here
from pipeline.shards import write_shard
from pipeline.storage import Store
from pipeline.verify import verify


def build(root: Path, store: Path, runner: Here | None = None, **options: object) -> ShardResult:
    chosen = BuildOptions(cut=Cut(pairs_per_shard=4), **options)
    return build_shards(root, str(store), chosen, runner=runner or Here())


@pytest.fixture
def store(tmp_path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def spoiled(cvusa, make_jpeg) -> Path:
    """Sixteen pairs, of one of which only decoding finds that an image is damaged."""
    data = make_jpeg((56, 308), 1)
    (cvusa / "streetview/panos/0000003.jpg").write_bytes(data[: len(data) // 2] + data[-2:])
    return cvusa


@pytest.mark.parametrize("is_alike", [True, False], ids=["the same options", "other options"])
def test_shard_published_meanwhile_is_taken_if_alike_and_never_written_over(is_alike, spoiled, store, monkeypatch):
    options = {"check_images": False}
    others = options if is_alike else {"check_images": True, "skip_unusable": True}
    won = []

    def while_another_job_wins(place):
        found = read_pointer(place)
        if not won:
            won.append(None)
            won[0] = build(spoiled, store, **others)
        return found

    monkeypatch.setattr(shard_work, "read_pointer", while_another_job_wins)
    if is_alike:
        result = build(spoiled, store, **options)
        assert (result.digest, result.generation, result.num_written) == (won[0].digest, 1, 0)
    else:
        with pytest.raises(ShardError, match=r"another job published first and wrote this shard otherwise[^\n]*$"):
            build(spoiled, store, **options)
    newest = Manifest.load(str(store))
    assert (newest.digest, newest.pairs.num_rows) == (won[0].digest, 16 if is_alike else 15)
    assert verify(newest).damages == []
    again = build(spoiled, store, **options)
    assert (again.generation, again.num_pairs) == (1 if is_alike else 2, 16)


def test_shard_replaced_by_a_job_that_has_not_published_stops_this_one(spoiled, store):
    class Crossed(Here):
        def run(self, function, inputs, tick):
            yield from super().run(function, inputs, tick)
            for spec, store_uri, *_ in inputs:
                write_shard(replace(spec, check_images=True), Store.from_uri(store_uri))

    with pytest.raises(ShardError, match="was replaced while this job ran"):
        build(spoiled, store, Crossed(), check_images=False)
    assert read_pointer(Store.from_uri(store)) is None
    again = build(spoiled, store, check_images=False)
    assert verify(Manifest.load(again.manifest)).damages == []
