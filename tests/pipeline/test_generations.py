"""Adding, changing and removing pairs makes a new generation; what did not change is neither rewritten nor read."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cvft.errors import ConfigError, ShardError
from pipeline import publish
from pipeline.build import BuildOptions, ShardResult, build_shards
from pipeline.dataset import PairDataset
from pipeline.manifest import Manifest
from pipeline.plan import Cut
from pipeline.pointer import POINTER_FILE, Pointer, move_pointer, read_pointer, read_versioned_pointer
from pipeline.profile import preresized
from pipeline.runner import Here
from pipeline.storage import Store
from pipeline.verify import verify


class Watched(Here):
    """Runs here and remembers what was run."""

    def __init__(self) -> None:
        self.functions: list[str] = []

    def run(self, function, inputs, tick):
        self.functions += [function.__name__] * len(inputs)
        yield from super().run(function, inputs, tick)


def build(root: Path, store: Path | str, runner: Here | None = None, **options: object) -> ShardResult:
    chosen = BuildOptions(**({"cut": Cut(pairs_per_shard=4)} | options))
    return build_shards(root, str(store), chosen, runner=runner or Here())


def states(store: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every tar: a tar that is written again has others."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(store.rglob("*.tar"))}


def contents(manifest_uri: str) -> dict[str, tuple[bytes, ...]]:
    manifest = Manifest.load(manifest_uri)
    datasets = [PairDataset(manifest, split) for split in manifest.splits]
    return {key: tuple(map(bytes, data.read(row))) for data in datasets for row, key in enumerate(data.keys)}


def expected(root: Path, keys: range) -> dict[str, tuple[bytes, ...]]:
    folders = ("streetview/panos", "bingmap/19")
    return {f"{n:07d}": tuple((root / folder / f"{n:07d}.jpg").read_bytes() for folder in folders) for n in keys}


def add_pairs(root: Path, numbers: range, make_jpeg, split: str = "train") -> None:
    for number in numbers:
        (root / f"streetview/panos/{number:07d}.jpg").write_bytes(make_jpeg((56, 308), 500 + number))
        (root / f"bingmap/19/{number:07d}.jpg").write_bytes(make_jpeg((187, 187), 700 + number))
        with (root / f"splits/{split}-19zl.csv").open("a") as stream:
            key = f"{number:07d}"
            stream.write(f"bingmap/19/{key}.jpg,streetview/panos/{key}.jpg,streetview/annotations/{key}.png\n")


@pytest.fixture
def store(tmp_path) -> Path:
    return tmp_path / "store"


def test_added_pairs_go_into_new_shards_and_finished_ones_are_not_touched(cvusa, store, make_jpeg):
    first = build(cvusa, store)
    before = states(store)
    add_pairs(cvusa, range(17, 23), make_jpeg)
    runner = Watched()
    second = build(cvusa, store, runner)
    after = states(store)
    assert {name: after[name] for name in before} == before
    assert (second.num_written, len(after) - len(before), second.generation) == (2, 2, 2)
    assert dict(second.changes) == {"kept": 16, "new": 6, "rewritten": 0, "dropped": 0}
    assert runner.functions == ["_write_shard_task"] * 2  # nothing else was read
    assert contents(second.manifest) == expected(cvusa, range(1, 23))
    assert contents(first.manifest) == expected(cvusa, range(1, 17))
    assert read_pointer(Store.from_uri(store)) == Pointer(
        generation=2, manifest=f"manifests/{second.digest[:16]}.parquet", digest=second.digest, previous=first.digest
    )


def test_dataset_grows_on_after_a_generation_that_only_dropped_whole_shards(cvusa, store, make_jpeg):
    build(cvusa, store)
    (cvusa / "splits/val-19zl.csv").write_text("")
    second = build(cvusa, store)
    assert (second.generation, second.num_written, dict(second.changes)["dropped"]) == (2, 0, 5)
    assert build(cvusa, store).digest == second.digest
    assert verify(Manifest.load(str(store))).kinds == {}
    add_pairs(cvusa, range(17, 19), make_jpeg)
    assert dict(build(cvusa, store).changes) == {"kept": 11, "new": 2, "rewritten": 0, "dropped": 0}


def test_manifest_keeps_the_rows_of_kept_shards_and_numbers_the_shards_anew(cvusa, store, make_jpeg):
    first = Manifest.load(build(cvusa, store).manifest)
    add_pairs(cvusa, range(17, 19), make_jpeg)
    (cvusa / "bingmap/19/0000001.jpg").write_bytes(make_jpeg((187, 187), 99))
    second = Manifest.load(build(cvusa, store).manifest)
    for manifest in (first, second):
        names = [manifest.shards[number].name for number in manifest.pairs["shard"].to_pylist()]
        held = {info.name: names.count(info.name) for info in manifest.shards}
        assert held == {info.name: info.num_pairs for info in manifest.shards}
    assert len({info.name for info in second.shards} & {info.name for info in first.shards}) == 4


def test_changed_image_of_the_same_size_moves_to_another_shard_and_the_old_one_stays(cvusa, store, caplog):
    before = expected(cvusa, range(1, 17))
    first = build(cvusa, store)
    path = cvusa / "bingmap/19/0000005.jpg"
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    caplog.set_level("INFO")
    second = build(cvusa, store, check_images=False)
    assert (second.num_written, second.changes["rewritten"], second.changes["dropped"]) == (1, 4, 0)
    assert "of them changed 1" in caplog.text
    assert "changed: 0000005" in caplog.text
    assert contents(second.manifest) == expected(cvusa, range(1, 17))
    assert contents(first.manifest) == before


@pytest.mark.parametrize("rebuild", [False, True])
def test_changing_an_image_back_and_forth_never_writes_over_an_older_shard(rebuild, cvusa, store):
    path = cvusa / "bingmap/19/0000005.jpg"
    original = path.read_bytes()
    seen = []
    for flip in (0, 1, 0, 2, 1):
        data = bytearray(original)
        data[-200] ^= flip
        path.write_bytes(data)
        result = build(cvusa, store, check_images=False, rebuild=rebuild)
        seen.append((result.manifest, expected(cvusa, range(1, 17))))
        for manifest, content in seen:
            assert contents(manifest) == content
    assert result.generation == 5


def test_removed_pairs_leave_their_shard_and_are_named(cvusa, store, caplog):
    build(cvusa, store)
    path = cvusa / "splits/train-19zl.csv"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "0000003" not in line))
    caplog.set_level("INFO")
    second = build(cvusa, store)
    assert (second.num_pairs, second.changes["dropped"], second.num_written) == (15, 1, 1)
    assert second.changes["rewritten"] in (2, 3)
    assert "dropped: 0000003" in caplog.text
    assert "is planned anew: a pair in it was changed or dropped" in caplog.text
    assert set(contents(second.manifest)) == set(expected(cvusa, range(1, 17))) - {"0000003"}


def test_pair_that_changes_its_split_moves(cvusa, store):
    build(cvusa, store)
    train, val = (cvusa / f"splits/{split}-19zl.csv" for split in ("train", "val"))
    lines = train.read_text().splitlines(keepends=True)
    train.write_text("".join(lines[1:]))
    with val.open("a") as stream:
        stream.write(lines[0])
    second = build(cvusa, store)
    assert Manifest.load(second.manifest).splits == {"train": 10, "val": 6}
    assert (second.changes["dropped"], second.changes["new"]) == (1, 1)
    assert contents(second.manifest) == expected(cvusa, range(1, 17))


def test_changed_location_rewrites_the_pairs_shard(cvusa, store):
    build(cvusa, store)
    path = cvusa / "split_locations/all.csv"
    lines = path.read_text().splitlines(keepends=True)
    lines[6] = "0.0,0.0,61.0,25.0,90\n"
    path.write_text("".join(lines))
    second = build(cvusa, store)
    assert second.num_written == 1
    rows = {row["key"]: row["latitude_deg"] for row in Manifest.load(second.manifest).pairs.to_pylist()}
    assert rows["0000007"] == 61.0


def test_dataset_in_another_place_with_other_times_is_read_once_and_is_the_same(cvusa, store, tmp_path):
    first = build(cvusa, store)
    shutil.copytree(cvusa, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.jpg"):
        os.utime(path, (1, 1))
    runner = Watched()
    again = build(tmp_path / "copy", store, runner)
    assert (again.digest, again.num_written, again.generation) == (first.digest, 0, 1)
    assert runner.functions == ["differing_pairs"]
    runner = Watched()
    build(tmp_path / "copy", store, runner)
    assert runner.functions == []  # now these times are known
    assert build(tmp_path / "copy", tmp_path / "other").digest == first.digest


def test_images_that_were_not_checked_are_when_that_is_asked_for(cvusa, store):
    path = cvusa / "bingmap/19/0000004.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    assert build(cvusa, store, check_images=False).num_pairs == 16
    assert build(cvusa, store, check_images=False).num_written == 0
    second = build(cvusa, store, skip_unusable=True)
    assert (second.num_pairs, [problem.kind for problem in second.excluded]) == (15, ["truncated"])
    runner = Watched()
    build(cvusa, store, runner, check_images=False, skip_unusable=True)
    assert runner.functions == []


def test_excluded_pair_is_mixed_into_no_new_shard_for_having_another_time(cvusa, store, tmp_path, make_jpeg):
    broken = cvusa / "bingmap/19/0000004.jpg"
    broken.write_bytes(b"broken")
    build(cvusa, store, skip_unusable=True)
    shutil.copytree(store, tmp_path / "other")
    add_pairs(cvusa, range(17, 27), make_jpeg)
    second = build(cvusa, store, skip_unusable=True)
    os.utime(broken, (1, 1))
    other = build(cvusa, tmp_path / "other", skip_unusable=True)
    assert (other.digest, dict(other.changes), len(other.excluded)) == (second.digest, dict(second.changes), 1)
    broken.write_bytes(make_jpeg((187, 187), 4))
    assert build(cvusa, store, skip_unusable=True).num_pairs == 26
    broken.write_bytes(b"")
    assert [problem.kind for problem in build(cvusa, store, skip_unusable=True).excluded] == ["empty_file"]


def test_damaged_stamps_cost_a_reading_and_nothing_else(cvusa, store, caplog):
    first = build(cvusa, store)
    next((store / "stamps").iterdir()).write_bytes(b"PAR1")
    assert build(cvusa, store).digest == first.digest
    assert "is damaged" in caplog.text


class TestOtherCut:
    @pytest.mark.parametrize(
        ("cut", "said"),
        [
            (Cut(pairs_per_shard=5), "4 pairs per shard.* not cvusa as 5 pairs per shard"),
            (Cut(pairs_per_shard=4, seed=1), "seed 0.* not .* seed 1"),
            (Cut(pairs_per_shard=4, profile=preresized((14, 77), (16, 16))), "profile original.* not .*preresized"),
        ],
    )
    def test_it_is_refused_with_both_named_unless_told(self, cut, said, cvusa, store):
        first = build(cvusa, store)
        with pytest.raises(ConfigError, match=f"{said}.*--rebuild"):
            build(cvusa, store, cut=cut)
        second = build(cvusa, store, cut=cut, rebuild=True)
        assert (second.generation, second.changes["new"]) == (2, 16)
        assert Manifest.load(second.manifest).profile == cut.profile
        assert contents(first.manifest) == expected(cvusa, range(1, 17))

    def test_rebuild_that_is_done_is_not_done_again(self, cvusa, store):
        build(cvusa, store)
        second = build(cvusa, store, cut=Cut(pairs_per_shard=5), rebuild=True)
        third = build(cvusa, store, cut=Cut(pairs_per_shard=5), rebuild=True)
        assert (third.digest, third.num_written, third.generation) == (second.digest, 0, 2)

    def test_preresized_dataset_grows_and_knows_its_originals(self, cvusa, store, make_jpeg):
        options = {"cut": Cut(pairs_per_shard=4, profile=preresized((14, 77), (16, 16)))}
        build(cvusa, store, **options)
        add_pairs(cvusa, range(17, 19), make_jpeg)
        for path in cvusa.rglob("*.jpg"):
            path.touch()
        second = build(cvusa, store, **options)
        assert dict(second.changes) == {"kept": 16, "new": 2, "rewritten": 0, "dropped": 0}


class TestRace:
    def test_loser_is_told_who_won_and_keeps_its_shards(self, cvusa, store, make_cvusa, tmp_path, monkeypatch):
        other = make_cvusa(tmp_path / "other", num_train=6, num_val=2)
        won = []

        def while_another_job_wins(place, pointer, version):
            monkeypatch.undo()
            won.append(build(other, store))
            return move_pointer(place, pointer, version)

        monkeypatch.setattr(publish, "move_pointer", while_another_job_wins)
        with pytest.raises(ShardError, match="another job published first: generation 1 is ") as error:
            build(cvusa, store)
        assert won[0].digest in str(error.value)
        assert "\n" not in str(error.value)
        assert read_pointer(Store.from_uri(store)).digest == won[0].digest
        assert len(list((store / "manifests").iterdir())) == 2
        assert contents(str(store)) == expected(other, range(1, 9))

    def test_two_jobs_of_the_same_data_both_succeed(self, cvusa, store, monkeypatch):
        won = []

        def while_another_job_wins(place, pointer, version):
            monkeypatch.undo()
            won.append(build(cvusa, store))
            return move_pointer(place, pointer, version)

        monkeypatch.setattr(publish, "move_pointer", while_another_job_wins)
        result = build(cvusa, store)
        assert (result.digest, result.generation) == (won[0].digest, 1)

    def test_of_many_moves_from_one_version_one_counts(self, tmp_path):
        place = Store.from_uri(tmp_path)
        digests = [f"{n:064x}" for n in range(8)]
        pointers = [
            Pointer(generation=n, manifest=f"manifests/{digest[:16]}.parquet", digest=digest, previous=None)
            for n, digest in enumerate(digests)
        ]
        with ThreadPoolExecutor(8) as pool:
            said = list(pool.map(lambda pointer: move_pointer(place, pointer, None), pointers))
        assert len(set(said)) == 1
        assert read_versioned_pointer(place)[0] == said[0]

    def test_pointer_deleted_meanwhile_is_told(self, tmp_path):
        place = Store.from_uri(tmp_path)
        name = f"manifests/{'0' * 16}.parquet"
        pointer = Pointer(generation=1, manifest=name, digest="0" * 64, previous=None)
        move_pointer(place, pointer, None)
        _, version = read_versioned_pointer(place)
        place.delete(POINTER_FILE)
        with pytest.raises(ShardError, match="was deleted while a job ran"):
            move_pointer(place, pointer, version)
