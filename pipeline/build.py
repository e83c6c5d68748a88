"""From raw pairs to shards and a manifest, on Ray: one task per shard, a bounded window of them, finished ones kept.

Order of events: scan -> plan (which pair in which shard, fingerprinted) -> shards, each followed by its sidecar ->
manifest. Killed anywhere and started again, it writes only what is missing and ends with the same manifest. No image
passes through Ray's object store: a task gets the names of its files and gives back a few numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from cvft.configuration import require
from cvft.errors import CvftError, DataError, ShardError, StoreError
from pipeline.manifest import Manifest, pair_table
from pipeline.raw import RawFolder
from pipeline.sampler import epoch_permutation
from pipeline.schema import PairSource
from pipeline.shards import FORMAT_VERSION, ShardEntry, ShardSpec, read_entry, write_shard
from pipeline.sources.base import Problem, SourceScan, count_kinds, count_splits, unusable_summary
from pipeline.sources.detect import open_source
from pipeline.storage import Store

RaySession = Callable[[], AbstractContextManager[None]]

_MAX_RETRIES = 3
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What `build_shards` made.

    Attributes:
        manifest: URI of the manifest.
        digest: The manifest's digest.
        layout: Layout of the raw data.
        num_pairs: Pairs in the shards.
        num_shards: Shards.
        num_bytes: Their size together.
        num_written: Shards written by this call; the others were there.
        seconds: Time this call took.
        problems: How often each kind of problem occurs in the raw data.
        excluded: The problems that kept listed pairs out.
    """

    manifest: str
    digest: str
    layout: str
    num_pairs: int
    num_shards: int
    num_bytes: int
    num_written: int
    seconds: float
    problems: Mapping[str, int]
    excluded: Sequence[Problem]


def build_shards(
    root: str | Path | RawFolder,
    store_uri: str,
    *,
    layout: str = "auto",
    split: str | None = None,
    pairs_per_shard: int = 1000,
    seed: int = 0,
    window: int | None = None,
    check_images: bool = True,
    skip_unusable: bool = False,
    progress: Callable[[int, int], None] | None = None,
    ray_session: RaySession = contextlib.nullcontext,
) -> ShardResult:
    """Shard a raw dataset into a store, on a Ray whose workers see `root` and reach the store.

    Args:
        root: Folder of the dataset, or a table of pairs; a local path or an `s3://` URI.
        store_uri: Where shards and manifest go.
        layout: `auto` or the layout it must be.
        split: See `open_source`.
        pairs_per_shard: The last shard of a split may hold fewer.
        seed: Of the permutation that mixes each split's pairs before they are cut into shards.
        window: Tasks submitted at a time; twice the cluster's CPUs if none.
        check_images: Decode every image before it is written.
        skip_unusable: Leave unusable pairs out (counted, and named in the manifest) instead of refusing.
        progress: Called with the number of pairs in finished shards and of all pairs.
        ray_session: Entered once there is something to write; without it Ray must be initialised.

    Raises:
        ConfigError: `pairs_per_shard`, `seed` or `window` is out of range.
        DataError: The folder is of no known layout, has no pairs, or has unusable ones and `skip_unusable` is not set.
        StoreError: The store cannot be written.
    """
    started = time.monotonic()
    _require_in_range(pairs_per_shard=pairs_per_shard, seed=seed, window=window)
    scan = open_source(root, layout=layout, split=split)
    _refuse_unusable(scan.problems, num_usable=len(scan.pairs), skip_unusable=skip_unusable)
    cut = {"pairs_per_shard": pairs_per_shard, "seed": seed}
    plan = plan_fingerprint(scan.pairs, **cut)
    specs = plan_shards(scan, plan, check_images=check_images, **cut)
    store = Store.from_uri(store_uri)
    # Written by the driver and before any work, so that a store that cannot be written is told at once.
    store.write_bytes(f"{_folder(plan)}/plan.json", json.dumps({"plan": plan, "layout": scan.layout, **cut}).encode())
    run = partial(_write_in_window, store_uri=store.uri(), window=window, ray_session=ray_session)
    entries, num_written = _make_shards(specs, store, folder=_folder(plan), run=run, progress=progress)
    problems = [*scan.problems, *(problem for entry in entries for problem in entry.problems)]
    num_pairs = sum(entry.info.num_pairs for entry in entries)
    _refuse_unusable(problems, num_usable=num_pairs, skip_unusable=skip_unusable)
    manifest = assemble_manifest(entries, problems, layout=scan.layout, plan=plan, store_uri=store.uri())
    kinds = count_kinds(problems)
    return _publish(manifest, num_written=num_written, seconds=time.monotonic() - started, problems=kinds)


def _publish(manifest: Manifest, *, num_written: int, seconds: float, problems: Mapping[str, int]) -> ShardResult:
    return ShardResult(
        manifest=manifest.publish(),
        digest=manifest.digest,
        layout=manifest.layout,
        num_pairs=manifest.pairs.num_rows,
        num_shards=len(manifest.shards),
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        num_written=num_written,
        seconds=seconds,
        problems=problems,
        excluded=manifest.excluded,
    )


def plan_fingerprint(pairs: Sequence[PairSource], *, pairs_per_shard: int, seed: int) -> str:
    """Return a digest of which pairs are sharded how; it names the shards' folder, so that plans never mix."""
    content = hashlib.sha256(json.dumps([FORMAT_VERSION, pairs_per_shard, seed]).encode())
    for pair in sorted(pairs, key=lambda pair: pair.key):
        place = asdict(pair.location) if pair.location else None
        sizes = [pair.ground_status.num_bytes, pair.aerial_status.num_bytes]
        content.update(json.dumps([pair.key, pair.split, pair.location_id, place, sizes], sort_keys=True).encode())
    return content.hexdigest()


def plan_shards(scan: SourceScan, plan: str, *, pairs_per_shard: int, seed: int, check_images: bool) -> list[ShardSpec]:
    """Mix each split's pairs by `seed` and cut them into shards, whatever order the source listed them in."""
    specs: list[ShardSpec] = []
    for split, num_pairs in count_splits(scan.pairs).items():
        ordered = sorted((pair for pair in scan.pairs if pair.split == split), key=lambda pair: pair.key)
        mixed = [ordered[row] for row in epoch_permutation(num_pairs, seed=seed, epoch=0)]
        specs.extend(
            ShardSpec(
                name=f"{_folder(plan)}/{split}-{number:05d}.tar",
                root=scan.root,
                pairs=mixed[start : start + pairs_per_shard],
                rules=scan.rules,
                check_images=check_images,
            )
            for number, start in enumerate(range(0, num_pairs, pairs_per_shard))
        )
    return specs


def _folder(plan: str) -> str:
    return f"shards/{plan[:12]}"


def assemble_manifest(
    entries: Sequence[ShardEntry], problems: Sequence[Problem], *, layout: str, plan: str, store_uri: str
) -> Manifest:
    """Join finished shards into a manifest; a shard none of whose pairs was usable is left out."""
    filled = [entry for entry in entries if entry.rows]
    excluded = sorted((problem for problem in problems if problem.is_unusable), key=str)
    return Manifest(
        layout=layout,
        plan=plan,
        pairs=pair_table([row | {"shard": number} for number, entry in enumerate(filled) for row in entry.rows]),
        shards=[entry.info for entry in filled],
        excluded=excluded,
        store_uri=store_uri,
    )


def _require_in_range(*, pairs_per_shard: int, seed: int, window: int | None) -> None:
    require(pairs_per_shard >= 1, f"pairs_per_shard: {pairs_per_shard} must be at least 1")
    require(0 <= seed < 2**64, f"seed: {seed} must lie in [0, 2**64)")
    require(window is None or window >= 1, f"window: {window} must be at least 1")


def _refuse_unusable(problems: Sequence[Problem], *, num_usable: int, skip_unusable: bool) -> None:
    summary = unusable_summary(problems, num_usable=num_usable)
    if summary and not (skip_unusable and num_usable):
        hint = "; mend or remove them, or leave them out with --skip-unusable" if num_usable else ""
        raise DataError(f"{summary}{hint}")


def _finished_entries(specs: Sequence[ShardSpec], store: Store, *, folder: str) -> dict[str, ShardEntry]:
    """Return what an earlier run wrote for these very specs; a shard that lacks pairs is redone, they may be mended."""
    present = frozenset(store.list(folder))
    entries = {}
    for spec in specs:
        if {spec.sidecar, spec.name} <= present:
            try:
                entry = read_entry(store, spec.sidecar)
            except ShardError as error:
                _LOGGER.warning("%s is written again: %s", spec.name, error)
                continue
            is_whole = entry.fingerprint == spec.fingerprint() and entry.info.num_pairs == len(spec.pairs)
            if is_whole and store.size(spec.name) == entry.info.num_bytes:
                entries[spec.name] = entry
    return entries


def _make_shards(
    specs: Sequence[ShardSpec],
    store: Store,
    *,
    folder: str,
    run: Callable[[Sequence[ShardSpec]], Iterator[ShardSpec]],
    progress: Callable[[int, int], None] | None,
) -> tuple[list[ShardEntry], int]:
    """Write the shards that are missing; return all entries in the order of `specs`, and how many were written."""
    entries = _finished_entries(specs, store, folder=folder)
    missing = [spec for spec in specs if spec.name not in entries]
    num_pairs = sum(len(spec.pairs) for spec in specs)
    num_done = num_pairs - sum(len(spec.pairs) for spec in missing)
    for spec in run(missing):
        entries[spec.name] = read_entry(store, spec.sidecar)
        num_done += len(spec.pairs)
        if progress is not None:
            progress(num_done, num_pairs)
    return [entries[spec.name] for spec in specs], len(missing)


def _write_shard_task(spec: ShardSpec, store_uri: str) -> dict[str, Any]:
    entry = write_shard(spec, Store.from_uri(store_uri))
    return {"name": entry.info.name, "num_pairs": entry.info.num_pairs}


def _write_in_window(
    specs: Sequence[ShardSpec], *, store_uri: str, window: int | None, ray_session: RaySession
) -> Iterator[ShardSpec]:
    """Write shards on Ray, at most `window` tasks at a time, and yield each one's spec as it is finished."""
    if specs:
        with ray_session():
            yield from _run_tasks(specs, store_uri, window)


def _run_tasks(specs: Sequence[ShardSpec], store_uri: str, window: int | None) -> Iterator[ShardSpec]:
    size = window or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    task = ray.remote(max_retries=_MAX_RETRIES, retry_exceptions=[OSError, StoreError])(_write_shard_task)
    waiting = list(reversed(specs))
    running: dict[Any, ShardSpec] = {}
    try:
        while waiting or running:
            while waiting and len(running) < size:
                spec = waiting.pop()
                running[task.remote(spec, store_uri)] = spec
            (done,), _ = ray.wait(list(running), num_returns=1)
            spec = running.pop(done)
            ray.get(done)
            yield spec
    except ray.exceptions.RayTaskError as error:
        for other in running:
            ray.cancel(other)
        # Ray's own error repeats the worker's traceback; ours is the one line that helps.
        raise error.cause if isinstance(error.cause, CvftError) else error from None
