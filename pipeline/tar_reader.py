"""A strict reader of our shards' headers: it lists members and extracts nothing.

It knows one kind of tar, that which `shard` writes: plain files under plain names, one after the other, zeros between
and after them. Everything else that a tar may hold (folders, links, devices, sparse files, long-name and pax headers,
absolute names and such that climb out of a folder, sizes in base 256) is refused, by name and position.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from cvft.errors import ShardError
from pipeline.storage import Store
from pipeline.tar_writer import member_header

BLOCK_BYTES = tarfile.BLOCKSIZE
ReadAt = Callable[[int, int], bytes | memoryview]
"""Gives so many bytes from a position on."""

_NAME = slice(0, 100)
_SIZE = slice(124, 136)
_CHECKSUM = slice(148, 156)
_TYPE = slice(156, 157)
_OCTAL = re.compile(rb"([0-7]+)[\0 ]+")
_END = bytes(2 * BLOCK_BYTES)
_NO_FILES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a folder",
    b"6": "a pipe",
    b"L": "a GNU long name",
    b"K": "a GNU long link",
    b"S": "a sparse file",
    b"x": "a pax header",
    b"g": "a global pax header",
}


class Member(NamedTuple):
    """One file of a tar.

    Attributes:
        name: Its name.
        offset: Of its first byte within the tar.
        num_bytes: Its length.
    """

    name: str
    offset: int
    num_bytes: int

    @property
    def stop(self) -> int:
        """Where the next header (or the end) begins."""
        return self.offset + self.num_bytes + -self.num_bytes % BLOCK_BYTES


def walk(read: ReadAt, *, shard: str, start: int = 0, stop: int, is_last: bool = True) -> Iterator[Member]:
    """Yield the members between two positions of a tar, reading headers and padding alone.

    Args:
        read: Called with growing positions.
        shard: The tar's name, for messages.
        start: Position of a header.
        stop: End of the tar; or, without `is_last`, the position of a header, where the walk ends.
        is_last: Whether the tar's end must stand before `stop`.

    Raises:
        ShardError: Something is not as `shard` writes it; names the tar and the position.
    """
    position = start
    names: set[str] = set()
    while position < stop:
        if stop - position < BLOCK_BYTES:
            raise ShardError(f"{shard}, byte {position}: the tar ends within a header")
        header = bytes(read(position, BLOCK_BYTES))
        if not any(header):
            break
        member = _parse(header, position=position, shard=shard)
        if member.name in names:
            raise ShardError(f"{shard}, byte {position}: a second member {member.name!r}")
        names.add(member.name)
        if member.stop > stop:
            raise ShardError(
                f"{shard}, byte {position}: member {member.name} of {member.num_bytes} bytes goes beyond byte {stop}"
            )
        yield member
        end = member.offset + member.num_bytes
        if any(read(end, member.stop - end)):
            raise ShardError(f"{shard}, byte {end}: the padding after {member.name} is not zero")
        position = member.stop
    if is_last:
        _check_end(read, position=position, stop=stop, shard=shard)
    elif position < stop:
        raise ShardError(f"{shard}, byte {position}: zeros in place of a header")


def list_members(store: Store, shard: str) -> list[Member]:
    """Return the members of a tar in a store, from ranged reads of its headers.

    Raises:
        ShardError: It is missing, or not a tar as `shard` writes it; names it and the position.
        StoreError: It cannot be read.
    """
    num_bytes = store.size(shard)
    if num_bytes is None:
        raise ShardError(f"{store.uri(shard)}: the shard is missing; shard again")
    members = walk(lambda start, length: store.read_range(shard, start, length), shard=store.uri(shard), stop=num_bytes)
    return list(members)


def _parse(header: bytes, *, position: int, shard: str) -> Member:
    def refuse(reason: str) -> ShardError:
        return ShardError(f"{shard}, byte {position}: {reason}; this is no header that `shard` wrote")

    checksum = _OCTAL.fullmatch(header[_CHECKSUM])
    if checksum is None or int(checksum[1], 8) != sum(header) - sum(header[_CHECKSUM]) + 8 * ord(" "):
        raise refuse("the header's checksum is wrong")
    if header[_TYPE] != b"0":
        kind = _NO_FILES.get(header[_TYPE], f"of unknown type {header[_TYPE]!r}")
        raise refuse(f"the member is {kind}, not a plain file")
    try:
        name = header[_NAME].rstrip(b"\0").decode()
    except UnicodeDecodeError:
        raise refuse("the member's name is not UTF-8") from None
    if not name.isprintable() or not name or name.startswith(".") or "/" in name or "\\" in name:
        raise refuse(f"the member's name {name!r} is no plain file name")
    size = _OCTAL.fullmatch(header[_SIZE])
    if size is None:
        raise refuse(f"the member's size {header[_SIZE]!r} is no octal number")
    member = Member(name, position + BLOCK_BYTES, int(size[1], 8))
    if header != member_header(name, member.num_bytes):
        raise refuse(f"the header of {name} has a time, an owner, a mode or other fields that are not zero")
    return member


def _check_end(read: ReadAt, *, position: int, stop: int, shard: str) -> None:
    end = position + len(_END)
    end += -end % tarfile.RECORDSIZE
    if stop < end:
        raise ShardError(f"{shard}, byte {stop}: the tar is cut off, its end of zeros up to byte {end} is missing")
    if any(read(position, end - position)):
        raise ShardError(f"{shard}, byte {position}: the tar's end is not zero")
    if stop > end:
        raise ShardError(f"{shard}, byte {end}: {stop - end} bytes follow the tar's end")
