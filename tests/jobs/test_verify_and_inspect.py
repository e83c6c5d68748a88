"""`cvft verify` and `cvft inspect` as scripts and people use them: exit codes, JSON, one line for what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from jobs import cli, inspect, verify
from pipeline.manifest import Manifest


@pytest.fixture
def dataset(manifest_uri, tmp_path) -> Manifest:
    """The town in shards, a copy for this test."""
    store = Path(Manifest.load(manifest_uri).store_uri)
    shutil.copytree(store, tmp_path / "store")
    return Manifest.load(str(tmp_path / "store/manifests" / Path(manifest_uri).name))


@pytest.fixture
def cvft(capfd, caplog):
    """Run a job; return exit code, result (None without one), the error line and the log."""

    def run(*arguments: object):
        capfd.readouterr()
        caplog.clear()
        with caplog.at_level("INFO", logger="cvft"):
            code = cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        errors = [line for line in err.splitlines() if line.startswith(f"cvft {arguments[0]}: error: ")]
        assert len(errors) == (code == 2)
        return code, json.loads(out.splitlines()[-1]) if out else None, "".join(errors), caplog.messages

    return run


def flip(dataset: Manifest, row: int = 0) -> str:
    """Flip a bit of an aerial image; return the shard's name."""
    place = dataset.pairs.to_pylist()[row]
    name = dataset.shards[place["shard"]].name
    path = Path(dataset.store_uri) / name
    content = bytearray(path.read_bytes())
    content[place["aerial_offset"] + 500] ^= 16
    path.write_bytes(content)
    return name


class TestVerify:
    def test_sound_shards_end_well(self, cvft, dataset):
        code, found, _, log = cvft("verify", "--manifest", dataset.uri)
        assert code == 0
        assert found == {
            "manifest": dataset.uri,
            "digest": dataset.digest,
            "shards": 3,
            "pairs": 16,
            "pairs_read": 16,
            "bytes_read": sum(shard.num_bytes for shard in dataset.shards),
            "damages": {},
            "damaged": [],
            "ok": True,
        }
        assert re.match(r"verifying: 16/16 pairs", log[-1])

    @pytest.mark.parametrize(
        ("options", "num_read"),
        [(("--sample", 3), 3), (("--fraction", 0.25), 4), (("--fraction", 0.01), 1), (("--quick",), 0)],
    )
    def test_less_may_be_read(self, cvft, dataset, options, num_read):
        code, found, _, _ = cvft("verify", "--manifest", dataset.uri, *options)
        assert (code, found["pairs_read"], found["ok"]) == (0, num_read, True)

    def test_damage_is_one_line_each_and_exit_code_2_and_repaired_from_the_raw_data(self, cvft, dataset, town):
        name = flip(dataset, 1)
        key = dataset.pairs["key"][1].as_py()
        code, found, error, log = cvft("verify", "--manifest", dataset.uri)
        assert (code, found["ok"], found["damages"]) == (2, False, {"wrong_image": 1})
        assert found["damaged"] == [{"path": name, "key": key, "kind": "wrong_image"}]
        assert [line for line in log if line.startswith(f"{name}, key {key}: wrong_image (the aerial image's bytes")]
        assert f"damaged: wrong_image 1; first: {name}, key {key}" in error
        assert "--repair --root" in error
        code, found, _, log = cvft("verify", "--manifest", dataset.uri, "--repair", "--root", town)
        assert (code, found["ok"], found["repaired"], found["not_repaired"]) == (0, True, [name], {})
        assert f"{name}: repaired" in log
        assert cvft("verify", "--manifest", dataset.uri)[0] == 0

    def test_what_cannot_be_repaired_is_exit_code_2_with_the_reason(self, cvft, dataset, town, tmp_path):
        name = flip(dataset)
        shutil.copytree(town, tmp_path / "town")
        key = dataset.pairs["key"][0].as_py()
        (tmp_path / f"town/streetview/panos/{key}.jpg").unlink()
        code, found, error, _ = cvft("verify", "--manifest", dataset.uri, "--repair", "--root", tmp_path / "town")
        reason = f"the raw data lacks 1 of its 8 pairs, first {key}"
        assert (code, found["ok"], found["not_repaired"]) == (2, False, {name: reason})
        assert f"0 damaged files are repaired, 1 are not; {name}: {reason}" in error

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--repair",), "--repair and --root go together"),
            (("--root", "x"), "--repair and --root go together"),
            (("--fraction", 0), "--fraction 0.0 must lie in (0, 1]"),
            (("--fraction", "nan"), "--fraction nan must lie in (0, 1]"),
            (("--sample", -1), "-1 must not be negative"),
            (("--threads", 0), "num_threads: 0"),
        ],
    )
    def test_impossible_arguments_are_refused_in_one_line(self, cvft, dataset, options, words):
        code, found, error, _ = cvft("verify", "--manifest", dataset.uri, *options)
        assert (code, found) == (2, None)
        assert words in error

    def test_damaged_manifest_is_named(self, cvft, dataset):
        path = Path(dataset.uri)
        path.write_bytes(path.read_bytes()[:-20])
        code, found, error, _ = cvft("verify", "--manifest", path)
        assert (code, found) == (2, None)
        assert f"{path}: the manifest is damaged" in error


class TestInspect:
    def test_numbers_come_without_a_picture(self, cvft, dataset, capfd):
        code, found, _, _ = cvft("inspect", "--manifest", dataset.uri)
        assert (code, found["pairs"], found["shards"], found["out"]) == (0, 16, 3, None)
        assert {split: facts["pairs"] for split, facts in found["splits"].items()} == {"train": 12, "val": 4}
        assert found["splits"]["val"]["leaks"] == 0

    @pytest.mark.parametrize(
        ("suffix", "options"),
        [("png", ("--shard", "val-00000.tar")), ("png", ("--num", 2)), ("html", ("--split", "val"))],
    )
    def test_sheet_is_written_where_it_is_asked_for(self, cvft, dataset, tmp_path, options, suffix):
        out = tmp_path / f"new/folder/sheet.{suffix}"
        code, found, _, _ = cvft("inspect", "--manifest", dataset.uri, "--out", out, *options)
        assert (code, found["out"]) == (0, str(out))
        if suffix == "png":
            with Image.open(out) as sheet:
                assert sheet.width == (872 if "--num" in options else 1296)
        else:
            assert dataset.digest in out.read_text()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--out", "sheet.gif"), "--out sheet.gif: must end with one of .png, .html"),
            (("--out", "sheet.png", "--split", "test"), "split 'test' is not in"),
            (("--out", "sheet.png", "--shard", "x.tar"), "'x.tar' is no shard"),
            (("--split", "val"), "--split val: says what --out shows"),
            (("--out", "sheet.png", "--num", 0), "num: 0 must lie in"),
        ],
    )
    def test_impossible_arguments_are_refused_in_one_line(self, cvft, dataset, options, words, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        code, found, error, _ = cvft("inspect", "--manifest", dataset.uri, *options)
        assert (code, found) == (2, None)
        assert words in error
        assert not (tmp_path / "sheet.png").exists()


def test_examples_in_the_help_parse():
    for job in (verify.JOB, inspect.JOB):
        assert job.example.startswith(f"cvft {job.name} --manifest demo/shards")
