"""Tables are read in the calling thread: a process that ends has no thread left that holds what Python has given up."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.parquet import read_parquet, rows_where


def parquet(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd", row_group_size=2)
    return stream.getvalue()


TABLE = pa.table({"key": ["a", "b", "c", "d", "e"], "shard": [0, 1, 0, None, 1]}).replace_schema_metadata({"k": "v"})


def test_table_comes_back_with_its_metadata():
    assert read_parquet(parquet(TABLE)).equals(TABLE, check_metadata=True)


def test_rows_are_those_that_an_expression_finds():
    assert rows_where(TABLE, "shard", 1).equals(TABLE.filter(pa.compute.field("shard") == 1))


@pytest.mark.parametrize("data", [b"", b"PAR1", parquet(TABLE)[:-20]])
def test_what_is_no_parquet_is_an_error(data):
    with pytest.raises((pa.ArrowException, OSError)):
        read_parquet(data)


_COUNT_THREADS = """
import sys
from pathlib import Path
from pipeline.manifest import Manifest
from pipeline.parquet import rows_where

def count():
    return len(list(Path("/proc/self/task").iterdir()))

before = count()
manifest = Manifest.load(sys.argv[1])
rows = [len(manifest.split("train")), len(rows_where(manifest.pairs, "shard", 0))]
assert min(rows) > 0
print(count() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads by /proc")
def test_a_manifest_is_read_without_any_further_thread(cvusa, tmp_path, make_shards):
    manifest = make_shards(cvusa, str(tmp_path / "store"))
    done = subprocess.run(
        [sys.executable, "-c", _COUNT_THREADS, manifest.uri], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0"
