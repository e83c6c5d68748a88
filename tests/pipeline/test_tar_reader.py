"""The reader of shards' headers finds what Python's tarfile finds in ours, and refuses every other tar."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvft.errors import ShardError
from pipeline.storage import Store
from pipeline.tar_reader import list_members, walk
from pipeline.tar_writer import TarWriter

_NAMES = st.from_regex(r"[a-zä0-9_-]{1,30}\.(ground|aerial)\.jpg", fullmatch=True)


def ours(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    tar = TarWriter(stream)
    for name, data in members.items():
        tar.add(name, data)
    tar.finish()
    return stream.getvalue()


def theirs(info: tarfile.TarInfo, data: bytes = b"", *, tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as tar:
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def read_all(content: bytes) -> list[tuple[str, int, int]]:
    def read(start: int, length: int) -> bytes:
        assert 0 <= start <= start + length <= len(content)
        return content[start : start + length]

    return [tuple(member) for member in walk(read, shard="a.tar", stop=len(content))]


def with_field(content: bytes, field: slice, value: bytes) -> bytes:
    """Change a field of the first header and mend its checksum."""
    header = bytearray(content[:512])
    header[field] = value.ljust(field.stop - field.start, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content[512:]


def changed(**fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo("a.jpg")
    for name, value in fields.items():
        setattr(info, name, value)
    return info


@given(st.dictionaries(_NAMES, st.binary(max_size=1500), max_size=6))
def test_members_are_those_that_tarfile_finds(members):
    content = ours(members)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    assert read_all(content) == expected
    assert [name for name, _, _ in expected] == list(members)


@pytest.mark.parametrize(
    "scheme",
    ["file", pytest.param("s3", marks=pytest.mark.objectstore)],
)
def test_members_are_listed_by_reading_headers_alone(scheme, tmp_path, request):
    store = Store.from_uri(tmp_path if scheme == "file" else request.getfixturevalue("s3_uri"))
    store.write_bytes("a.tar", ours({"k.ground.jpg": bytes(5000), "k.aerial.jpg": b"x" * 512, "k.json": b"{}"}))
    members = list_members(store, "a.tar")
    assert [(member.name, member.offset, member.num_bytes) for member in members] == [
        ("k.ground.jpg", 512, 5000),
        ("k.aerial.jpg", 6144, 512),
        ("k.json", 7168, 2),
    ]
    with pytest.raises(ShardError, match=r"b\.tar: the shard is missing"):
        list_members(store, "b.tar")


def test_huge_member_is_not_read(tmp_path):
    """Eight gigabytes of nothing: a sparse file on the disk, a plain member in the tar."""
    head = with_field(ours({"a.jpg": b""})[:512], slice(124, 136), b"%011o" % (8**11 - 512))
    path = tmp_path / "a.tar"
    path.write_bytes(head)
    with path.open("r+b") as stream:
        stream.truncate(-(-(8**11 + 1024) // 10240) * 10240)
    (member,) = list_members(Store.from_uri(tmp_path), "a.tar")
    assert member.num_bytes == 8**11 - 512


GOOD = ours({"a.jpg": b"x" * 700})
HOSTILE = {
    "a name that climbs out": (theirs(tarfile.TarInfo("../a.jpg")), "'../a.jpg' is no plain file name"),
    "a name that climbs out from within": (theirs(tarfile.TarInfo("x/../../a.jpg")), "is no plain file name"),
    "an absolute name": (with_field(GOOD, slice(0, 100), b"/etc/passwd"), "'/etc/passwd' is no plain file name"),
    "a Windows path": (theirs(tarfile.TarInfo("C:\\a.jpg")), "is no plain file name"),
    "a name split over the prefix field": (theirs(tarfile.TarInfo("d" * 90 + "/" + "n" * 90)), "fields that are not"),
    "a hidden name": (theirs(tarfile.TarInfo(".bashrc")), "is no plain file name"),
    "an empty name": (with_field(GOOD, slice(0, 100), b""), "'' is no plain file name"),
    "a name with a line break": (theirs(tarfile.TarInfo("a\n.jpg")), "is no plain file name"),
    "a name cut by a null byte": (with_field(GOOD, slice(0, 100), b"a\0../b"), "is no plain file name"),
    "a name that is not UTF-8": (with_field(GOOD, slice(0, 100), b"\xff.jpg"), "name is not UTF-8"),
    "a symbolic link": (theirs(changed(type=tarfile.SYMTYPE, linkname="/etc/passwd")), "is a symbolic link"),
    "a hard link": (theirs(changed(type=tarfile.LNKTYPE, linkname="b")), "is a hard link"),
    "a character device": (theirs(changed(type=tarfile.CHRTYPE)), "is a character device"),
    "a block device": (theirs(changed(type=tarfile.BLKTYPE)), "is a block device"),
    "a pipe": (theirs(changed(type=tarfile.FIFOTYPE)), "is a pipe"),
    "a folder": (theirs(changed(type=tarfile.DIRTYPE)), "is a folder"),
    "a sparse file": (with_field(GOOD, slice(156, 157), b"S"), "is a sparse file"),
    "an old plain file": (with_field(GOOD, slice(156, 157), b"\0"), r"of unknown type b'\\x00'"),
    "an unknown type": (with_field(GOOD, slice(156, 157), b"Z"), "of unknown type b'Z'"),
    "a GNU long name": (theirs(tarfile.TarInfo("n" * 200), tar_format=tarfile.GNU_FORMAT), "is a GNU long name"),
    "a GNU long link": (
        theirs(changed(type=tarfile.SYMTYPE, linkname="n" * 200), tar_format=tarfile.GNU_FORMAT),
        "is a GNU long link",
    ),
    "a pax header": (theirs(tarfile.TarInfo("n" * 200), tar_format=tarfile.PAX_FORMAT), "is a pax header"),
    "a plain file with a link's target": (with_field(GOOD, slice(157, 257), b"/etc"), "fields that are not zero"),
    "a file that is executable by all and setuid": (theirs(changed(mode=0o4777)), "fields that are not zero"),
    "an owner": (theirs(changed(uid=1000)), "fields that are not zero"),
    "a time": (theirs(changed(mtime=1)), "fields that are not zero"),
    "another magic": (with_field(GOOD, slice(257, 265), b"ustar  \0"), "fields that are not zero"),
    "a wrong checksum": (b"b" + GOOD[1:], "checksum is wrong"),
    "an empty checksum": (GOOD[:148] + bytes(8) + GOOD[156:], "checksum is wrong"),
    "a negative size": (with_field(GOOD, slice(124, 136), b"-0000000001"), "is no octal number"),
    "a size in base 256": (with_field(GOOD, slice(124, 136), b"\x80" + bytes(3) + b"\xff" * 8), "is no octal number"),
    "a size that is no number": (with_field(GOOD, slice(124, 136), b"nonsense"), "is no octal number"),
    "a size beyond the tar": (with_field(GOOD, slice(124, 136), b"77777777777"), "goes beyond byte 10240"),
    "a short size": (with_field(GOOD, slice(124, 136), b"00000000001"), "byte 513: the padding .* is not zero"),
    "the same name twice": (GOOD[:1536] + GOOD, r"byte 1536: a second member 'a\.jpg'"),
    "padding that is not zero": (GOOD[:1300] + b"x" + GOOD[1301:], r"byte 1212: the padding after a\.jpg is not zero"),
    "a header after the end": (GOOD[:1536] + bytes(512) + GOOD[:8192], "byte 1536: the tar's end is not zero"),
    "bytes after the end": (GOOD + b"x", "byte 10240: 1 bytes follow the tar's end"),
    "a second tar behind": (GOOD + GOOD, "byte 10240: 10240 bytes follow"),
    "more zeros than a record": (GOOD + bytes(512), "byte 10240: 512 bytes follow"),
    "no end": (GOOD[:1536], "byte 1536: the tar is cut off"),
    "half an end": (GOOD[:2560], "byte 2560: the tar is cut off"),
    "cut within a member": (GOOD[:900], r"byte 0: member a\.jpg of 700 bytes goes beyond byte 900"),
    "cut within a header": (GOOD[:1536] + GOOD[:100], "byte 1536: the tar ends within a header"),
    "nothing": (b"", "byte 0: the tar is cut off"),
    "something else": (b"\x1f\x8b" + GOOD[2:], "checksum is wrong"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_tar_is_refused_with_its_name_and_position(what):
    content, words = HOSTILE[what]
    with pytest.raises(ShardError, match=rf"^a\.tar, byte \d+: .*{words}|^a\.tar, {words}"):
        read_all(content)


def test_a_part_of_a_tar_is_walked_up_to_the_next_header():
    content = ours({"a.jpg": b"1", "b.jpg": b"2", "c.jpg": b"3"})

    def names(start: int, stop: int) -> list[str]:
        read = lambda position, length: content[position : position + length]  # noqa: E731
        return [member.name for member in walk(read, shard="a.tar", start=start, stop=stop, is_last=False)]

    assert names(1024, 2048) == ["b.jpg"]
    assert names(0, 3072) == ["a.jpg", "b.jpg", "c.jpg"]
    with pytest.raises(ShardError, match=r"byte 1024: member .* goes beyond byte 1700"):
        names(1024, 1700)
    with pytest.raises(ShardError, match="byte 3072: zeros in place of a header"):
        names(2048, 4096)
