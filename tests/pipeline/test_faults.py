"""What happens when something goes wrong: the table, and the tests of those faults that belong to no single module.

Whatever happens, no pair is lost or doubled, and what cannot go on says so in one line (exit code 2).
"""

from __future__ import annotations

import ast
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
from blake3 import blake3

from cvft.config import PreprocessConfig
from cvft.errors import DataError, ShardError
from pipeline import sequential
from pipeline.dataset import PairDataset
from pipeline.inspection import draw_sheet
from pipeline.loader import Loader
from pipeline.manifest import Manifest
from pipeline.tar_writer import TarWriter
from pipeline.validate import validate
from pipeline.verify import verify
from tests.pipeline import shard_process

HERE = Path(__file__).parent
FAULTS = [
    # fault | what happens | shown by
    (
        "503 storm",
        "every request is repeated, eight times in all; a storm without end is one line",
        "test_storage_faults.py::test_seven_refusals_in_a_row_are_survived_by_every_request",
    ),
    (
        "connection reset",
        "a download goes on where it broke, an upload is repeated",
        "test_storage_faults.py::test_upload_that_breaks_is_repeated",
    ),
    (
        "truncated body",
        "noticed by its length, read on where it broke, never joined with another version",
        "test_storage_faults.py::test_body_that_breaks_is_read_on_where_it_broke",
    ),
    (
        "disk full",
        "one line, nothing left behind, what was there stays",
        "test_storage.py::test_full_disk_is_one_line_and_leaves_what_was_there",
    ),
    (
        "disk full under the cache",
        "one line, nothing left behind",
        "test_cache.py::test_full_disk_is_one_line_and_leaves_nothing",
    ),
    (
        "503 storm",
        "every request is repeated, up to eight times with growing pauses",
        "test_storage_faults.py::test_seven_refusals_in_a_row_are_survived_by_every_request",
    ),
    (
        "503 storm without end",
        "one line; no torso, no parts left behind",
        "test_storage_faults.py::test_upload_that_fails_half_way_leaves_nothing",
    ),
    (
        "reset or truncated body, reading",
        "read on where it broke, from the same version",
        "test_storage_faults.py::test_body_that_breaks_is_read_on_where_it_broke",
    ),
    (
        "reset or truncated body, writing",
        "the request is repeated",
        "test_storage_faults.py::test_upload_that_breaks_is_repeated",
    ),
    (
        "lost answer to a conditional write",
        "the winner learns that it has won",
        "test_storage_faults.py::test_write_whose_answer_got_lost_has_still_won",
    ),
    (
        "wrong secret",
        "one line that names the variable",
        "../objectstore/test_radosgw.py::test_wrong_secret_is_one_line_that_names_the_variable",
    ),
    (
        "missing bucket",
        "one line that names it",
        "test_storage_faults.py::test_missing_bucket",
    ),
    (
        "bit flip in a shard",
        "found by every reader, named with shard and key; `verify --repair` mends it",
        "test_verify.py::test_every_flipped_bit_of_a_shard_is_found_and_its_pair_named",
    ),
    (
        "the same, mended",
        "written again from the raw data to the very hash, or left with the reason",
        "test_repair.py::test_damaged_and_missing_files_come_back_to_the_bit",
    ),
    (
        "bit flip in a cached shard",
        "dropped and fetched once more",
        "test_dataset.py::test_bit_that_flips_in_the_cache_is_mended_from_the_store",
    ),
    (
        "bit flip in a manifest",
        "refused, or found by `verify` where it is no content",
        "test_verify.py::test_every_flipped_bit_of_a_manifest_is_found",
    ),
    (
        "bit flip in a sidecar",
        "its shard is written again",
        "test_build.py::test_shard_with_a_damaged_sidecar_is_written_again_and_said",
    ),
    (
        "two racing jobs",
        "one manifest wins, the other job names the winner; the winner's shards are whole",
        "test_faults.py::test_of_two_racing_jobs_one_wins_and_the_other_says_so",
    ),
    (
        "two racing jobs of the same data",
        "both end with the same manifest",
        "test_faults.py::test_two_racing_jobs_of_the_same_data_end_with_one_manifest",
    ),
    (
        "hostile tar",
        "refused by name; nothing is extracted",
        "test_tar_reader.py::test_hostile_tar_is_refused_with_its_name_and_position",
    ),
    (
        "hostile tar in a shard's place",
        "refused by every reader, nothing is extracted",
        "test_faults.py::test_hostile_tar_in_a_shards_place_is_refused_by_every_reader",
    ),
    (
        "truncated tar",
        "the pass through webdataset stops with its name",
        "test_sequential.py::test_truncated_or_joined_tar_is_refused_by_name",
    ),
    (
        "decompression bomb in raw data",
        "counted as unusable, never decoded, kept out of shards",
        "test_faults.py::test_bomb_in_raw_data_is_named_and_kept_out_of_shards",
    ),
    (
        "decompression bomb in a shard",
        "no reader decodes it; named with shard and key",
        "test_faults.py::test_bomb_in_a_shard_is_decoded_by_nobody",
    ),
]
PREPROCESS = PreprocessConfig(ground_size_px=(16, 80), aerial_size_px=(48, 48))


@pytest.mark.parametrize("fault", FAULTS, ids=[fault for fault, _, _ in FAULTS])
def test_table_names_tests_that_are_there(fault):
    file, _, name = fault[2].partition("::")
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


class TestRace:
    """Real processes, each of which has planned and begun before either publishes."""

    @staticmethod
    def race(root: Path, store: Path, cuts: tuple[int, int], barrier: Path) -> list[tuple[int, str, str]]:
        barrier.mkdir()
        command = [sys.executable, shard_process.__file__, str(root), str(store)]
        jobs = [
            subprocess.Popen([*command, str(cut), str(barrier), "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for cut in cuts
        ]
        outputs = [job.communicate(timeout=120) for job in jobs]
        return [(job.returncode, out.decode(), err.decode()) for job, (out, err) in zip(jobs, outputs, strict=True)]

    def test_of_two_racing_jobs_one_wins_and_the_other_says_so(self, cvusa, tmp_path):
        ends = self.race(cvusa, tmp_path / "store", (4, 5), tmp_path / "barrier")
        assert sorted(code for code, _, _ in ends) == [0, 2]
        (winner,) = (json.loads(out) for code, out, _ in ends if code == 0)
        (line,) = (err.splitlines()[-1] for code, _, err in ends if code == 2)
        assert line.startswith("cvft shard: error: ")
        assert "another job published first" in line
        assert winner["digest"] in line
        manifest = Manifest.load(str(tmp_path / "store"))
        assert (manifest.digest, winner["generation"]) == (winner["digest"], 1)
        assert sorted(manifest.pairs["key"].to_pylist()) == [f"{number:07d}" for number in range(1, 17)]
        assert verify(manifest).damages == []

    def test_two_racing_jobs_of_the_same_data_end_with_one_manifest(self, cvusa, tmp_path):
        ends = self.race(cvusa, tmp_path / "store", (4, 4), tmp_path / "barrier")
        assert [code for code, _, _ in ends] == [0, 0], ends
        first, second = (json.loads(out) for _, out, _ in ends)
        assert first == second
        manifest = Manifest.load(str(tmp_path / "store"))
        assert (manifest.digest, manifest.pairs.num_rows) == (first["digest"], 16)
        assert verify(manifest).damages == []


def everything_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


READERS: dict[str, Callable[[Manifest], object]] = {
    "loader": lambda manifest: list(
        Loader(PairDataset(manifest, "train"), preprocess=PREPROCESS, batch_size=2).eval_batches()
    ),
    "sequential": lambda manifest: list(sequential.read_pairs(manifest, "train")),
    "inspect": lambda manifest: draw_sheet(manifest),
}


def hostile_tar(path: Path, how: str) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo(
            {"traversal": "../../escaped.ground.jpg", "absolute": str(path.with_name("escaped.jpg"))}.get(how, "a.jpg")
        )
        if how == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        elif how == "device":
            info.type = tarfile.CHRTYPE
        elif how == "long name":
            info.name = "n" * 100_000
        tar.addfile(info)
        if how == "huge header":  # a member of 2**62 bytes, of which there is none
            tar.fileobj.seek(0)
            info.size = 2**62
            tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))


@pytest.mark.parametrize("how", ["traversal", "absolute", "link", "device", "long name", "huge header"])
def test_hostile_tar_in_a_shards_place_is_refused_by_every_reader(how, cvusa, tmp_path, make_shards):
    manifest = make_shards(cvusa, str(tmp_path / "store"))
    name, num_bytes = manifest.shards[0].name, manifest.shards[0].num_bytes
    path = tmp_path / "store" / name
    hostile_tar(path, how)
    with path.open("r+b") as stream:  # of the right length, or the length alone would tell
        stream.truncate(num_bytes)
    before = everything_below(tmp_path)
    for read in READERS.values():
        with pytest.raises(ShardError, match=name):
            read(manifest)
    assert {(damage.path, damage.kind) for damage in verify(manifest).damages} == {
        (name, "wrong_image"),
        (name, "bad_tar"),
    }
    assert everything_below(tmp_path) == before


def bomb() -> bytes:
    """A PNG of a few bytes that claims 100,000 x 100,000 pixels: 30 GB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def test_bomb_in_raw_data_is_named_and_kept_out_of_shards(cvusa, tmp_path, make_shards):
    (cvusa / "bingmap/19/0000003.jpg").write_bytes(bomb())
    report = validate(cvusa)
    assert not report.ok
    assert [problem.key for problem in report.details if problem.kind == "too_large"] == ["0000003"]
    with pytest.raises(DataError, match=r"too_large 1.*0000003\.jpg.*100000x100000"):
        make_shards(cvusa, str(tmp_path / "store"))
    manifest = make_shards(cvusa, str(tmp_path / "store"), skip_unusable=True)
    assert "0000003" not in manifest.pairs["key"].to_pylist()
    assert [(problem.kind, problem.key) for problem in manifest.excluded] == [("too_large", "0000003")]
    assert manifest.pairs.num_rows == 15


def with_bomb(manifest: Manifest) -> tuple[Manifest, str]:
    """Forge a manifest and its first shard so that all hashes are right and one aerial image is a bomb."""
    shard = manifest.shards[0]
    path = Path(manifest.store_uri) / shard.name
    content = path.read_bytes()
    rows = manifest.pairs.to_pylist()
    with path.open("wb") as stream:
        tar = TarWriter(stream)
        for row in (row for row in rows if row["shard"] == 0):
            for role in ("ground", "aerial"):
                data = content[row[f"{role}_offset"] :][: row[f"{role}_bytes"]]
                data = bomb() if (role, row) == ("aerial", rows[1]) else data
                kind = "png" if data[1:4] == b"PNG" else "jpg"
                row[f"{role}_offset"] = tar.add(f"{row['key']}.{role}.{kind}", data)
                row[f"{role}_bytes"], row[f"{role}_xxh3_128"] = len(data), xxhash.xxh3_128_hexdigest(data)
            facts = {name: row[name] for name in ("key", "location_id", "split", "latitude_deg", "longitude_deg")}
            tar.add(f"{row['key']}.json", json.dumps(facts | {"heading_deg": row["heading_deg"]}).encode())
            tar.flush()
        tar.finish()
    forged = replace(shard, num_bytes=tar.position, blake3=blake3(path.read_bytes()).hexdigest())
    return (
        Manifest(
            layout=manifest.layout,
            plan=manifest.plan,
            pairs=manifest.pairs.from_pylist(rows, schema=manifest.pairs.schema),
            shards=[forged, *manifest.shards[1:]],
            excluded=[],
            store_uri=manifest.store_uri,
        ),
        rows[1]["key"],
    )


def test_bomb_in_a_shard_is_decoded_by_nobody(cvusa, tmp_path, make_shards):
    manifest, key = with_bomb(make_shards(cvusa, str(tmp_path / "store")))
    manifest.publish()
    assert set(verify(manifest).kinds) == {"bad_sidecar"}  # it is what the manifest says
    assert len(READERS["sequential"](manifest)) == 11  # bytes, not yet pixels
    for reader in ("loader", "inspect"):
        with pytest.raises(
            DataError, match=rf"train-00000\.tar, key {key}: (the )?aerial image.* claims 100000x100000"
        ):
            READERS[reader](manifest)
