"""Damaged shards written again from the raw data, by the functions that `shard` writes them with.

A shard is made beside the store first. Only if it comes out with the very hash that the manifest has for it does it
take the damaged one's place; otherwise the raw data has changed, and the damaged shard stays for what is left in it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.manifest import Manifest
from pipeline.parquet import rows_where
from pipeline.raw import RawFolder
from pipeline.schema import PairSource
from pipeline.shard_checks import Damage
from pipeline.shards import ShardEntry, ShardSpec, write_shard
from pipeline.sources.base import SourceScan
from pipeline.sources.detect import open_source
from pipeline.storage import Store

_COPY_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class RepairReport:
    """What `repair` did.

    Attributes:
        repaired: The files that are whole again, within the store.
        failed: Of the others, why not.
    """

    repaired: Sequence[str]
    failed: Mapping[str, str]


def repair(
    manifest: Manifest,
    damages: Sequence[Damage],
    root: str | Path | RawFolder,
    *,
    layout: str = "auto",
    split: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RepairReport:
    """Write damaged or missing files of a dataset again, one shard at a time.

    Args:
        manifest: The dataset.
        damages: What `verify` found.
        root: The raw data.
        layout: See `open_source`.
        split: See `open_source`.
        progress: Called with the number of shards looked after and of all damaged ones.

    Raises:
        DataError: The raw data is of no known layout.
        StoreError: The store cannot be written, the raw data's not read, or there is no room for one shard in the
            folder for temporary files.
    """
    store = Store.from_uri(manifest.store_uri)
    repaired: list[str] = []
    failed: dict[str, str] = {}
    for damage in damages:
        if damage.kind == "damaged_manifest":
            store.write_bytes(damage.path, manifest.encode())
            repaired.append(damage.path)
        elif damage.shard is None:
            failed[damage.path] = "it is no shard; `shard --rebuild` begins the dataset anew"
    files: dict[int, set[str]] = {}
    for damage in damages:
        if damage.shard is not None:
            files.setdefault(damage.shard, set()).add(damage.path)
    scan = open_source(root, layout=layout, split=split) if files else None
    listed = {pair.key: pair for pair in scan.pairs} if scan else {}
    for number, (shard, paths) in enumerate(sorted(files.items()), start=1):
        assert scan is not None
        trouble = _write_again(manifest, shard, scan, listed=listed, store=store, paths=paths)
        if trouble:
            failed |= dict.fromkeys(sorted(paths), trouble)
        else:
            repaired += sorted(paths)
        if progress is not None:
            progress(number, len(files))
    return RepairReport(repaired=repaired, failed=failed)


def _write_again(
    manifest: Manifest, shard: int, scan: SourceScan, *, listed: Mapping[str, PairSource], store: Store, paths: set[str]
) -> str:
    """Put the files `paths` of a shard in their places, whole; return why not, or an empty string."""
    rows = rows_where(manifest.pairs, "shard", shard).to_pylist()
    absent = [row["key"] for row in rows if row["key"] not in listed]
    if absent:
        return f"the raw data lacks {len(absent)} of its {len(rows)} pairs, first {absent[0]}"
    spec = ShardSpec(
        name=manifest.shards[shard].name,
        root=scan.root,
        pairs=[listed[row["key"]] for row in rows],
        rules=scan.rules,
        profile=manifest.profile,
        check_images=False,  # the hash is the check
    )
    with tempfile.TemporaryDirectory(prefix="cvft-repair-") as folder:
        beside = Store.from_uri(folder)
        entry = write_shard(spec, beside)
        if entry.info != manifest.shards[shard]:
            return _difference(entry, rows)
        for path in sorted(paths, reverse=True):  # the shard before its sidecar, as always
            with beside.open_input(path) as source, store.open_output(path) as target:
                while chunk := source.read(_COPY_BYTES):
                    target.write(chunk)
    return ""


def _difference(entry: ShardEntry, rows: Sequence[Mapping[str, Any]]) -> str:
    if entry.problems and entry.info.num_pairs < len(rows):
        return f"the raw data has changed: {entry.problems[0]}"
    for position, row in enumerate(rows):
        for name, values in entry.columns.items():
            if values[position] != row[name] and not name.endswith("_offset"):
                return f"the raw data has changed: key {row['key']} has another {name}"
    return "the raw data has changed in what the pairs' JSON tells"
