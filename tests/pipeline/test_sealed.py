"""A sealed Parquet file reads as before, and every flipped bit of it is found."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sealed import is_whole, seal


@pytest.fixture
def parquet() -> bytes:
    stream = io.BytesIO()
    table = pa.table({"key": ["a", "b"], "number": [1.5, None]}).replace_schema_metadata({"cvft": "{}"})
    pq.write_table(table, stream, compression="zstd")
    return stream.getvalue()


def test_sealed_file_reads_as_before(parquet):
    table = pq.read_table(io.BytesIO(seal(parquet)))
    assert table.equals(pq.read_table(io.BytesIO(parquet)), check_metadata=True)
    assert len(seal(parquet)) == len(parquet) + 32


def test_every_flipped_bit_is_found(parquet):
    sealed = seal(parquet)
    assert is_whole(sealed)
    for bit in range(8 * len(sealed)):
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << bit % 8
        assert not is_whole(bytes(damaged))


def test_cut_longer_and_unsealed_files_are_not_whole(parquet):
    sealed = seal(parquet)
    assert not any(is_whole(sealed[:length]) for length in range(len(sealed)))
    assert not is_whole(sealed + b"\0")
    assert not is_whole(parquet)
