"""What `validate` prints and writes: JSON for programs, a list that `shard` takes, a page, an exit code."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest

from jobs import entry, validate
from pipeline.exclusion import leave_out, read_exclusions
from pipeline.sources.detect import open_source
from pipeline.sources.kinds import KINDS


@pytest.fixture
def dirty(town, tmp_path) -> Path:
    """The town with a truncated panorama, a missing aerial image, a row that is none, and a query that leaks."""
    root = tmp_path / "dirty"
    shutil.copytree(town, root)
    train, val = (
        [line.split(",") for line in (root / f"splits/{split}-19zl.csv").read_text().splitlines()]
        for split in ("train", "val")
    )
    image = root / train[0][1]
    image.write_bytes(image.read_bytes()[:1000])
    (root / train[1][0]).unlink()
    shutil.copy(root / train[2][1], root / val[0][1])
    with (root / "splits/val-19zl.csv").open("a") as stream:
        stream.write("lonely.jpg\n")
    return root


def run(code: int, *arguments: object) -> dict:
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        assert entry.main(validate.JOB, [str(argument) for argument in arguments]) == code
    return json.loads(stdout.getvalue().splitlines()[-1])


def test_result_says_what_is_there_what_is_wrong_and_what_it_means(dirty):
    found = run(2, "--root", dirty)
    assert (found["root"], found["layout"], found["base"], found["ok"]) == (str(dirty), "cvusa", "", False)
    assert found["pairs"] == {"train": 10, "val": 4}
    assert found["problems"] == {"bad_row": 1, "leak_ground_bytes": 1, "missing_aerial": 1, "truncated": 1}
    for kind, count in found["problems"].items():
        told = found["kinds"][kind]
        assert (told["count"], told["is_unusable"]) == (count, KINDS[kind].is_unusable)
        assert (told["consequence"], told["remedy"]) == (KINDS[kind].consequence, KINDS[kind].remedy)
        assert kind in told["first"]
    assert found["images"]["aerial"]["sizes_px"] == {"750x750": 14}
    assert found["leaks"]["val"]["num_leaked"] == 1
    assert found["leaks"]["val"]["num_by_trait"]["ground_bytes"] == 1


def test_json_file_names_every_problem(dirty, tmp_path):
    found = run(2, "--root", dirty, "--json", tmp_path / "new/v.json")
    written = json.loads((tmp_path / "new/v.json").read_text(encoding="utf-8"))
    assert found["json"] == str(tmp_path / "new/v.json")
    assert len(written["details"]) == sum(found["problems"].values())
    assert {one["kind"] for one in written["details"]} == set(found["problems"])
    assert {name: written[name] for name in ("pairs", "problems", "leaks")} == {
        name: found[name] for name in ("pairs", "problems", "leaks")
    }


@pytest.mark.parametrize("leaks", [False, True])
def test_dataset_without_the_pairs_of_the_fix_list_has_nothing_unusable_but_rows_that_name_no_pair(
    leaks, dirty, tmp_path
):
    path = tmp_path / "exclude.txt"
    found = run(2, "--root", dirty, "--fix-list", path, *["--fix-leaks"] * leaks)
    exclusions = read_exclusions(path)
    assert len(exclusions) == found["fix_list_pairs"] == 2 + leaks
    assert {comment.partition(":")[0] for comment in exclusions.values()} == {"missing_aerial", "truncated"} | (
        {"leak_ground_bytes"} if leaks else set()
    )
    assert "# no key, mend the list: val-19zl.csv:5: bad_row" in path.read_text(encoding="utf-8")
    scan = leave_out(open_source(dirty), exclusions, named_by="the list")
    assert len(scan.pairs) == 16 - len(exclusions)
    assert {problem.kind for problem in scan.problems} == {"excluded_by_list", "bad_row"}


def test_page_is_written_into_a_folder_or_under_its_name(dirty, tmp_path):
    for place, expected in (("report", "report/validation.html"), ("deep/page.html", "deep/page.html")):
        found = run(2, "--root", dirty, "--html", tmp_path / place)
        assert found["html"] == str(tmp_path / expected)
        assert "leak_ground_bytes" in (tmp_path / expected).read_text(encoding="utf-8")


def test_presence_alone_is_checked_when_told(dirty):
    found = run(2, "--root", dirty, "--no-images", "--threads", 1)
    assert found["problems"] == {"bad_row": 1, "missing_aerial": 1}
    assert found["images"]["ground"]["sizes_px"] == {}
    assert found["leaks"]["val"]["num_by_trait"] == {"position_and_heading": 0}


def test_without_the_training_split_leaks_are_null(town):
    assert run(0, "--root", town, "--train-split", "elsewhere")["leaks"] is None


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--threads", "0"], "--threads 0"), (["--fix-leaks"], "--fix-list FILE")]
)
def test_arguments_that_make_no_sense_are_refused(arguments, said, town, capfd):
    assert entry.main(validate.JOB, ["--root", str(town), *arguments]) == 2
    assert said in capfd.readouterr().err
