"""Parquet files read in the calling thread alone.

pyarrow reads by default with threads of its own, which may still hold one of Python's buffers when a program ends; then
the process aborts after all its work is done ("terminate called without an active exception", apache/arrow issue
34314), with an exit code that says it failed. Our tables take milliseconds: one thread will do.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


def read_parquet(data: bytes) -> pa.Table:
    """Decode a whole Parquet file.

    Raises:
        pa.ArrowException: It is none, or it is damaged.
        OSError: Likewise.
    """
    return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)


def rows_where(table: pa.Table, column: str, value: object) -> pa.Table:
    """Return the rows whose column holds a value; by a mask, because pyarrow evaluates expressions with threads."""
    return table.filter(pc.equal(table[column], value))
