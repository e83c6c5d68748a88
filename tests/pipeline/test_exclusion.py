"""A list of keys with comments is read as people write it, and names only pairs that there are."""

from __future__ import annotations

import pytest

from cvft.errors import DataError
from pipeline.exclusion import leave_out, read_exclusions
from pipeline.sources.detect import open_source


def test_blanks_comments_crlf_and_a_byte_order_mark_are_harmless(tmp_path):
    path = tmp_path / "exclude.txt"
    path.write_bytes("\ufeffa\r\n\r\n  ä-b  # why # so\r\n#c\r\n # d\r\nx#1  # a key with a sign\r\ny#2\r\n".encode())
    assert read_exclusions(path) == {"a": "", "ä-b": "why # so", "x#1": "a key with a sign", "y#2": ""}


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "list").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is no exclusion list"):
        read_exclusions(tmp_path / "list")


def test_pairs_are_left_out_usable_or_not_and_named(cvusa):
    (cvusa / "bingmap/19/0000003.jpg").unlink()
    scan = leave_out(open_source(cvusa), {"0000003": "missing", "0000005": ""}, named_by="list")
    assert len(scan.pairs) == 14
    assert [(one.kind, one.key, one.detail) for one in scan.problems] == [
        ("excluded_by_list", "0000003", "missing"),
        ("excluded_by_list", "0000005", "listed in list"),
    ]


def test_key_that_is_in_the_dataset_nowhere_is_refused(cvusa):
    with pytest.raises(DataError, match="lists key 'elsewhere'"):
        leave_out(open_source(cvusa), {"elsewhere": ""}, named_by="list")
