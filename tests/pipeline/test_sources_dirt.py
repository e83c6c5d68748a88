"""The same dirt in every layout: each kind is survived, counted and named."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from cvft.errors import DataError
from pipeline.sources.base import count_kinds
from pipeline.sources.detect import open_source
from pipeline.storage import Store

KEYS = ("0000001", "0000002", "0000003")


@dataclass(frozen=True)
class Kit:
    """A small dataset in one layout: three pairs of train.

    Attributes:
        root: Its folder.
        list: The text file that lists the pairs; none in CVACT.
        header: A first line that does not belong there; none where one does.
        ground: File of the first pair's panorama.
        aerial: File of its aerial image.
        row: Returns a row that lists a pair of given files.
    """

    root: Path
    list: Path | None
    header: str | None
    ground: Path
    aerial: Path
    row: Callable[[str, str], str]


def fill(root: Path, names: list[str], jpeg: bytes) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg)


def write_list(path: Path, rows: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


def cvusa_kit(root: Path, jpeg: bytes) -> Kit:
    def row(ground: str, aerial: str) -> str:
        return f"bingmap/19/{aerial}.jpg,streetview/panos/{ground}.jpg,x.png"

    fill(root, [f"{folder}/{key}.jpg" for key in KEYS for folder in ("bingmap/19", "streetview/panos")], jpeg)
    write_list(root / "all.csv", ["0,0,60,25,0"] * 3)
    listed = write_list(root / "splits/train-19zl.csv", [row(key, key) for key in KEYS])
    first = root / "streetview/panos/0000001.jpg", root / "bingmap/19/0000001.jpg"
    return Kit(root, listed, "aerial,ground,annotation", *first, row)


def vigor_kit(root: Path, jpeg: bytes) -> Kit:
    def row(ground: str, aerial: str) -> str:
        return f"{ground},60,25,.jpg {aerial}.jpg 1 2" + f" {aerial}.jpg 3 4" * 3

    fill(root, [f"Seattle/panorama/{key},60,25,.jpg" for key in KEYS], jpeg)
    fill(root, [f"Seattle/satellite/{key}.jpg" for key in KEYS], jpeg)
    listed = write_list(root / "splits/Seattle/same_area_balanced_train.txt", [row(key, key) for key in KEYS])
    write_list(root / "splits/Seattle/same_area_balanced_test.txt", [])
    first = root / "Seattle/panorama/0000001,60,25,.jpg", root / "Seattle/satellite/0000001.jpg"
    return Kit(root, listed, "panorama satellite", *first, row)


def table_kit(root: Path, jpeg: bytes) -> Kit:
    def row(ground: str, aerial: str) -> str:
        return f"{ground},g/{ground}.jpg,a/{aerial}.jpg,60,25,train"

    fill(root, [f"{folder}/{key}.jpg" for key in KEYS for folder in "ga"], jpeg)
    rows = ["key,ground,aerial,latitude,longitude,split", *(row(key, key) for key in KEYS)]
    return Kit(root, write_list(root / "pairs.csv", rows), None, root / "g/0000001.jpg", root / "a/0000001.jpg", row)


@cache
def act_list() -> bytes:
    lists = {name: {"n": 0, "valInd": np.zeros((0, 1))} for name in ("valSet", "valSetAll")}
    train = {"n": 3, "trainInd": np.array([[1], [2], [3]])}
    stream = io.BytesIO()
    utm_m = np.full((3, 2), (692_000.0, 6_092_000.0))
    savemat(stream, {"panoIds": np.array(KEYS), "utm": utm_m, "trainSet": train} | lists)
    return stream.getvalue()


def cvact_kit(root: Path, jpeg: bytes) -> Kit:
    half = "ANU_data_small"
    fill(root, [f"{half}/streetview/{key}_grdView.jpg" for key in KEYS], jpeg)
    fill(root, [f"{half}/satview_polish/{key}_satView_polish.jpg" for key in KEYS], jpeg)
    (root / "ACT_data.mat").write_bytes(act_list())
    (root / "ANU_data_test/satview_polish").mkdir(parents=True)
    first = root / half / "streetview/0000001_grdView.jpg", root / half / "satview_polish/0000001_satView_polish.jpg"
    return Kit(root, None, None, *first, lambda ground, aerial: "")


KITS = {"cvusa": cvusa_kit, "vigor": vigor_kit, "table": table_kit, "cvact": cvact_kit}


@pytest.fixture(params=list(KITS))
def kit(request, tmp_path, make_jpeg) -> Kit:
    return KITS[request.param](tmp_path, make_jpeg((20, 20), 0))


@pytest.fixture(params=[name for name in KITS if name != "cvact"])
def listed(request, tmp_path, make_jpeg) -> Kit:
    return KITS[request.param](tmp_path, make_jpeg((20, 20), 0))


def found(kit: Kit) -> tuple[list[str], dict[str, int]]:
    scan = open_source(kit.root)
    return [pair.key for pair in scan.pairs], count_kinds(scan.problems)


def test_clean_dataset_has_all_pairs_with_places_and_no_problem(kit):
    assert found(kit) == (list(KEYS), {})
    assert all(pair.location is not None for pair in open_source(kit.root).pairs)


@pytest.mark.parametrize("role", ["ground", "aerial"])
def test_missing_file(role, kit):
    getattr(kit, role).unlink()
    assert found(kit) == (list(KEYS[1:]), {f"missing_{role}": 1})


@pytest.mark.parametrize("role", ["ground", "aerial"])
def test_empty_file(role, kit):
    getattr(kit, role).write_bytes(b"")
    assert found(kit) == (list(KEYS[1:]), {"empty_file": 1})


def test_folder_in_an_images_place(kit):
    kit.aerial.unlink()
    kit.aerial.mkdir()
    assert found(kit) == (list(KEYS[1:]), {"missing_aerial": 1})


@pytest.mark.parametrize("suffix", [".JPG", ".png", ".jpeg"])
def test_file_under_another_suffix_is_used(suffix, kit):
    kit.aerial.rename(kit.aerial.with_suffix(suffix))
    keys, kinds = found(kit)
    assert keys == list(KEYS)
    assert kinds == ({} if kit.list is None else {"other_suffix": 1})  # CVACT's list names no suffix
    assert open_source(kit.root).pairs[0].aerial.endswith(suffix)


def test_windows_lines_a_byte_order_mark_and_blank_lines_at_the_end(listed):
    lines = listed.list.read_text().splitlines()
    listed.list.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "", "", ""]).encode())
    assert found(listed) == (list(KEYS), {})


@pytest.mark.parametrize("layout", ["cvusa", "vigor"])
def test_header_where_none_belongs(layout, tmp_path, make_jpeg):
    kit = KITS[layout](tmp_path, make_jpeg((20, 20), 0))
    kit.list.write_text(f"{kit.header}\n{kit.list.read_text()}")
    assert found(kit) == (list(KEYS), {})


def test_row_once_more_and_key_with_another_file(listed):
    with listed.list.open("a") as stream:
        stream.write(f"{listed.row(KEYS[0], KEYS[0])}\n{listed.row(KEYS[0], KEYS[1])}\n")
    assert found(listed) == (list(KEYS), {"duplicate_key": 1, "duplicate_row": 1})


def test_name_that_is_not_utf8(listed):
    name = os.fsencode(listed.aerial).replace(b"0000001.", b"caf\xe9.")
    os.rename(os.fsencode(listed.aerial), name)
    text = listed.list.read_bytes()
    row = listed.row(KEYS[0], "CAFE").encode().replace(b"CAFE", b"caf\xe9")
    listed.list.write_bytes(text.replace(listed.row(KEYS[0], KEYS[0]).encode(), row))
    scan = open_source(listed.root)
    assert len(scan.pairs) == 3
    assert [(problem.kind, problem.path.rpartition("/")[2]) for problem in scan.problems] == [
        ("non_utf8_name", "caf\\xe9.jpg")
    ]
    assert scan.root.read_bytes(scan.pairs[0].aerial) == scan.root.read_bytes(scan.pairs[1].aerial)


def test_key_that_is_not_utf8_is_a_bad_key(listed):
    row = listed.row("CAFE", KEYS[0]).encode().replace(b"CAFE", b"caf\xe9")
    listed.list.write_bytes(listed.list.read_bytes() + row + b"\n")
    keys, kinds = found(listed)
    assert keys == list(KEYS)
    assert kinds == {"bad_key": 1}


def test_a_suffix_noted_for_a_name_that_is_not_utf8_can_be_printed(listed):
    os.rename(os.fsencode(listed.aerial), os.fsencode(listed.aerial).replace(b"0000001.jpg", b"caf\xe9.png"))
    text = listed.list.read_bytes()
    row = listed.row(KEYS[0], "CAFE").encode().replace(b"CAFE", b"caf\xe9")
    listed.list.write_bytes(text.replace(listed.row(KEYS[0], KEYS[0]).encode(), row))
    details = [problem.detail for problem in open_source(listed.root).problems if problem.kind == "other_suffix"]
    assert len(details) == 1
    assert details[0].endswith("caf\\xe9.jpg")


@pytest.mark.parametrize("layout", ["cvusa", "table"])
def test_a_quotation_mark_that_is_not_closed_swallows_no_rows(layout, tmp_path, make_jpeg):
    listed = KITS[layout](tmp_path, make_jpeg((20, 20), 0))
    lines = listed.list.read_text().splitlines(keepends=True)
    listed.list.write_text("".join([*lines[:-1], '"' + lines[-1], *lines]))
    with pytest.raises(DataError, match=rf":{len(lines)}: .*; close or remove a quotation mark"):
        open_source(listed.root)


def test_row_of_one_column(listed):
    with listed.list.open("a") as stream:
        stream.write("lonely.jpg\n")
    keys, kinds = found(listed)
    assert keys == list(KEYS)
    assert kinds == {"bad_row": 1}


@pytest.mark.objectstore
def test_object_store_tells_the_same(kit, s3_uri):
    kit.ground.unlink()
    store = Store.from_uri(s3_uri)
    for path in kit.root.rglob("*"):
        if path.is_file():
            store.write_bytes(path.relative_to(kit.root).as_posix(), path.read_bytes())
    local, remote = open_source(kit.root), open_source(s3_uri)
    known = [problem for problem in local.problems if problem.kind == "missing_ground"]
    assert [problem for problem in remote.problems if problem.kind == "missing_ground"] == known
    assert [(pair.key, pair.ground, pair.metadata) for pair in remote.pairs] == [
        (pair.key, pair.ground, pair.metadata) for pair in local.pairs
    ]
