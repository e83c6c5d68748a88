"""The tar writer's bytes are those of the standard library, whatever the names and sizes."""

from __future__ import annotations

import io
import tarfile

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tar_writer import TarWriter, member_header

_NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=30)


def tar_of(members: list[tuple[str, bytes]]) -> tuple[bytes, list[int], str]:
    stream = io.BytesIO()
    tar = TarWriter(stream)
    offsets = []
    for number, (name, data) in enumerate(members):
        offsets.append(tar.add(name, data))
        if number % 3 == 2:
            tar.flush()
    tar.finish()
    return stream.getvalue(), offsets, tar.blake3()


@given(st.lists(st.tuples(_NAMES, st.binary(max_size=1500)), max_size=8))
def test_bytes_equal_those_of_the_tarfile_module(members):
    content, offsets, digest = tar_of(members)
    oracle = io.BytesIO()
    with tarfile.open(fileobj=oracle, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert content == oracle.getvalue()
    assert digest == blake3(content).hexdigest()
    assert [content[start : start + len(data)] for start, (_, data) in zip(offsets, members, strict=True)] == [
        data for _, data in members
    ]


@pytest.mark.parametrize("size", [0, 1, 511, 512, 8**11 - 1, 8**11 - 8])
@pytest.mark.parametrize("name", ["a", "k" * 89 + ".aerial.jpg", "folder/" + "k" * 96, "ä" * 50, "日本" * 16])
def test_header_equals_that_of_the_tarfile_module(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    assert member_header(name, size) == info.tobuf(format=tarfile.USTAR_FORMAT, encoding="utf-8")


@pytest.mark.parametrize(("name", "size"), [("k" * 101, 0), ("a", 8**11)])
def test_what_ustar_cannot_hold_is_refused(name, size):
    with pytest.raises(ValueError, match=r"too long|overflow"):
        member_header(name, size)
