"""Finished shards become a manifest, and the manifest the store's newest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from cvft.errors import ShardError
from pipeline.exclusion import EXCLUDED_BY_LIST
from pipeline.manifest import PAIR_SCHEMA, Manifest
from pipeline.plan import Plan
from pipeline.pointer import Pointer, move_pointer
from pipeline.shards import ShardEntry
from pipeline.sources.base import Problem
from pipeline.storage import Store


def assemble_manifest(
    plan: Plan, entries: Sequence[ShardEntry], problems: Sequence[Problem], *, store_uri: str
) -> Manifest:
    """Join kept and finished shards into a manifest; a shard none of whose pairs was usable is left out.

    If that changes nothing, the manifest is the one that the plan stands on.
    """
    base, kept = plan.base, plan.kept_shards
    filled = [entry for entry in entries if entry.info.num_pairs]
    excluded = sorted((one for one in problems if one.is_unusable or one.kind == EXCLUDED_BY_LIST), key=str)
    if base is not None and not filled and len(kept) == len(base.shards) and excluded == list(base.excluded):
        return base
    tables = [_kept_rows(base, kept)] if base is not None and kept else []
    for number, entry in enumerate(filled, start=len(kept)):
        columns = {**entry.columns, "shard": [number] * entry.info.num_pairs}
        tables.append(pa.table({name: columns[name] for name in PAIR_SCHEMA.names}, schema=PAIR_SCHEMA))
    return Manifest(
        layout=plan.layout,
        plan=plan.fingerprint,
        pairs=pa.concat_tables([PAIR_SCHEMA.empty_table(), *tables]).combine_chunks(),
        shards=[*(base.shards[number] for number in kept if base), *(entry.info for entry in filled)],
        excluded=excluded,
        store_uri=store_uri,
        profile=plan.cut.profile,
    )


def publish(store: Store, manifest: Manifest, pointer: Pointer | None, version: str | None) -> int:
    """Publish the manifest and move the pointer to it; return its generation.

    Args:
        store: The dataset's store.
        manifest: The manifest.
        pointer: What the pointer said when the manifest's plan was made.
        version: The pointer's version then.

    Raises:
        ShardError: Another job has moved the pointer elsewhere meanwhile.
        StoreError: The store cannot be read or written.
    """
    manifest.publish()
    if pointer is not None and pointer.digest == manifest.digest:
        return pointer.generation
    moved = Pointer(
        generation=pointer.generation + 1 if pointer else 1,
        manifest=manifest.path,
        digest=manifest.digest,
        previous=pointer.digest if pointer else None,
    )
    winner = move_pointer(store, moved, version)
    if winner.digest != manifest.digest:
        raise ShardError(
            f"{store.uri()}: another job published first: generation {winner.generation} is {winner.digest}; this "
            f"job's shards and manifest {manifest.digest} are kept, the same command makes the next generation"
        )
    return winner.generation


def _kept_rows(base: Manifest, kept: Sequence[int]) -> pa.Table:
    """Return the rows of the kept shards, which are numbered anew from 0."""
    numbers = np.full(len(base.shards), -1, dtype=np.int32)
    numbers[list(kept)] = np.arange(len(kept), dtype=np.int32)
    shard = numbers[base.pairs["shard"].to_numpy()]
    place = PAIR_SCHEMA.get_field_index("shard")
    return base.pairs.set_column(place, PAIR_SCHEMA.field("shard"), pa.array(shard)).filter(pa.array(shard >= 0))
