"""Parquet files that carry a hash of all their own bytes, so that one flipped bit is found wherever it lies.

A Parquet file is row groups and, at its end, a footer that says where they begin; its readers follow these positions
and never see what stands between the last row group and the footer. The hash (BLAKE3, 32 bytes) stands there.
"""

from __future__ import annotations

from blake3 import blake3

_MAGIC = b"PAR1"
_TAIL_BYTES = 4 + len(_MAGIC)  # the footer's length and the magic
_HASH_BYTES = 32


def seal(parquet: bytes) -> bytes:
    """Return the file with the hash of its bytes before its footer."""
    footer = _footer(parquet)
    return parquet[:footer] + blake3(parquet).digest() + parquet[footer:]


def is_whole(sealed: bytes) -> bool:
    """Tell whether these are the very bytes that `seal` returned."""
    footer = _footer(sealed)
    start = footer - _HASH_BYTES
    return start >= 0 and blake3(sealed[:start] + sealed[footer:]).digest() == sealed[start:footer]


def _footer(parquet: bytes) -> int:
    """Return where the footer begins; in a damaged file that may be anywhere."""
    return len(parquet) - _TAIL_BYTES - int.from_bytes(parquet[-_TAIL_BYTES : -len(_MAGIC)], "little")
