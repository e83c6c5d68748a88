"""From raw pairs to shards, a manifest and the pointer to it, in steps that a restart goes on from.

Order of events: scan -> changes since the newest manifest -> plan, written down -> shards, each followed by its sidecar
-> stamps -> manifest, named by its digest -> pointer, by compare-and-swap. Killed anywhere and started again, a job
does what is missing and ends with the same digest; whatever stood before stays readable. No image passes through Ray's
object store: a task gets the names of its files and gives back a number.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cvft.errors import ConfigError, DataError, ShardError
from pipeline.exclusion import leave_out, read_exclusions
from pipeline.generations import Changes, Stamps, differing_pairs, find_changes
from pipeline.manifest import Manifest
from pipeline.plan import Cut, Plan, make_plan, read_plan
from pipeline.pointer import Pointer, read_versioned_pointer
from pipeline.publish import assemble_manifest, publish
from pipeline.raw import RawFolder
from pipeline.runner import Runner
from pipeline.shard_work import BuildProgress, ShardWork
from pipeline.sources.base import Problem, SourceScan, count_kinds, unusable_summary
from pipeline.sources.detect import open_source
from pipeline.storage import Store

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What `build_shards` made.

    Attributes:
        manifest: URI of the manifest.
        digest: The manifest's digest.
        generation: 1 for a dataset's first manifest, then one more for each.
        layout: Layout of the raw data.
        num_pairs: Pairs in the shards.
        num_shards: Shards.
        num_bytes: Their size together.
        num_written: Shards written by this call; the others were there.
        num_retries: Tasks that were tried again.
        changes: Pairs by what became of them since the manifest before: kept, new, rewritten, dropped.
        seconds: Time this call took.
        problems: How often each kind of problem occurs in the lists and in the images that this call read.
        excluded: The problems that kept listed pairs out.
    """

    manifest: str
    digest: str
    generation: int
    layout: str
    num_pairs: int
    num_shards: int
    num_bytes: int
    num_written: int
    num_retries: int
    changes: Mapping[str, int]
    seconds: float
    problems: Mapping[str, int]
    excluded: Sequence[Problem]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How to shard.

    Attributes:
        layout: `auto` or the layout it must be.
        split: See `open_source`.
        cut: How pairs are cut into shards.
        check_images: Decode every image before it is written.
        skip_unusable: Leave unusable pairs out (counted, and named in the manifest) instead of refusing.
        exclude: List of keys to leave out, a path or URI.
        rebuild: Cut all pairs anew, whatever the newest manifest is.
    """

    layout: str = "auto"
    split: str | None = None
    cut: Cut = field(default_factory=Cut)
    check_images: bool = True
    skip_unusable: bool = False
    exclude: str | Path | None = None
    rebuild: bool = False


def build_shards(
    root: str | Path | RawFolder,
    store_uri: str,
    options: BuildOptions,
    *,
    runner: Runner,
    progress: Callable[[BuildProgress], None] | None = None,
) -> ShardResult:
    """Shard a raw dataset into a store, on top of what the store holds of it.

    Args:
        root: Folder of the dataset, or a table of pairs; a local path or an `s3://` URI.
        store_uri: Where shards and manifest go.
        options: How.
        runner: Runs the tasks; its workers see `root` and reach the store.
        progress: Called as shards are finished, and now and then between.

    Raises:
        ConfigError: The newest manifest was cut otherwise and `rebuild` is not set.
        DataError: The folder is of no known layout, has no pairs, or has unusable ones and `skip_unusable` is not set;
            the exclusion list names an unknown key.
        ShardError: The store's pointer or newest manifest is damaged, or another job published first.
        StoreError: The store cannot be read or written.
        ClusterError: Workers were lost again and again.
    """
    started = time.monotonic()
    scan = open_source(root, layout=options.layout, split=options.split)
    if options.exclude is not None:
        scan = leave_out(scan, read_exclusions(options.exclude), named_by=str(options.exclude))
    _refuse_unusable(scan.problems, num_usable=len(scan.pairs), skip_unusable=options.skip_unusable)
    store = Store.from_uri(store_uri)
    pointer, version = read_versioned_pointer(store)
    base, stamps = _newest(store, pointer)
    changes = _changes(scan, base, stamps, options, runner) if base else None
    plan = _plan(scan, options, base, changes)
    work = ShardWork(store, plan, runner, skip_unusable=options.skip_unusable, progress=progress)
    entries = work.run()
    problems = [*scan.problems, *(changes.still_excluded if changes else ())]
    problems += [problem for entry in entries for problem in entry.problems]
    manifest = assemble_manifest(plan, entries, problems, store_uri=store.uri())
    _refuse_unusable(problems, num_usable=manifest.pairs.num_rows, skip_unusable=options.skip_unusable)
    if manifest.plan == plan.fingerprint:  # a plan that only drops shards has no work that would have written it
        plan.write(store)
    stamps.write(store, manifest.digest, scan.pairs, check_images=options.check_images)
    generation = publish(store, manifest, pointer, version)
    return ShardResult(
        manifest=manifest.uri,
        digest=manifest.digest,
        generation=generation,
        layout=manifest.layout,
        num_pairs=manifest.pairs.num_rows,
        num_shards=len(manifest.shards),
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        num_written=work.num_written,
        num_retries=runner.num_retries,
        changes=_count(plan, changes),
        seconds=time.monotonic() - started,
        problems=count_kinds(problems),
        excluded=manifest.excluded,
    )


def _newest(store: Store, pointer: Pointer | None) -> tuple[Manifest | None, Stamps]:
    if pointer is None:
        return None, Stamps({})
    base = Manifest.load(store.uri(pointer.manifest))
    return base, Stamps.read(store, base.digest)


def _changes(scan: SourceScan, base: Manifest, stamps: Stamps, options: BuildOptions, runner: Runner) -> Changes:
    return find_changes(
        scan,
        base,
        stamps,
        check_images=options.check_images,
        retry_excluded=not options.skip_unusable,
        settle=lambda doubts: (keys for _, keys in runner.run(differing_pairs, doubts, lambda: None)),
    )


def _plan(scan: SourceScan, options: BuildOptions, base: Manifest | None, changes: Changes | None) -> Plan:
    """Plan on top of the newest manifest, or anew where there is none or the user wants it."""
    if base is None or changes is None:
        return make_plan(scan, options.cut, check_images=options.check_images)
    if options.rebuild:
        anew = make_plan(scan, options.cut, check_images=options.check_images, base=base)
        if not _is_made_so(base, anew, changes):
            _LOGGER.info("cutting all %d pairs anew beside %s", len(scan.pairs), base.uri)
            return anew
    else:
        _refuse_other_cut(scan, options.cut, base)
    _tell_changes(changes, base)
    return make_plan(
        scan,
        options.cut,
        check_images=options.check_images,
        base=base,
        kept_shards=changes.kept_shards,
        remaining=list(changes.remaining.values()),
        new=changes.new,
    )


def _is_made_so(base: Manifest, anew: Plan, changes: Changes) -> bool:
    """Tell whether the newest manifest is what cutting all pairs anew gave: then a restarted rebuild is done."""
    if changes.remaining or changes.new:
        return False
    try:
        facts = read_plan(base)
    except ShardError as error:
        _LOGGER.warning("%s", error)
        return False
    return facts.num_kept_shards == 0 and facts.content == anew.content


def _refuse_other_cut(scan: SourceScan, cut: Cut, base: Manifest) -> None:
    facts = read_plan(base)
    if (facts.layout, facts.cut) != (scan.layout, cut):
        raise ConfigError(
            f"{base.store_uri}: holds {facts.layout} cut as {facts.cut}, not {scan.layout} as {cut}; "
            "name the same, another store, or --rebuild to cut all pairs anew"
        )


def _tell_changes(changes: Changes, base: Manifest) -> None:
    num_rewritten = sum(map(len, changes.remaining.values()))
    if not (changes.new or changes.remaining):
        _LOGGER.info("no pair differs from %s", base.uri)
        return
    _LOGGER.info(
        "on top of %s: kept %d pairs, new %d, rewritten %d (of them changed %d), dropped %d",
        base.uri,
        changes.num_kept,
        len(changes.new),
        num_rewritten,
        len(changes.changed),
        len(changes.dropped),
    )
    for shard in changes.remaining:
        _LOGGER.info("%s is planned anew: a pair in it was changed or dropped", base.shards[shard].name)
    for what, keys in (("changed", changes.changed), ("dropped", changes.dropped)):
        if keys:
            _LOGGER.info("%s: %s%s", what, ", ".join(keys[:5]), ", ..." if len(keys) > 5 else "")


def _count(plan: Plan, changes: Changes | None) -> dict[str, int]:
    """Count pairs by what became of them; cut anew, all are new."""
    if changes is None or plan.base is None or (not plan.kept_shards and not changes.remaining):
        return {"kept": 0, "new": sum(len(spec.pairs) for spec in plan.specs), "rewritten": 0, "dropped": 0}
    return {
        "kept": plan.num_kept_pairs,
        "new": len(changes.new),
        "rewritten": sum(map(len, changes.remaining.values())),
        "dropped": len(changes.dropped),
    }


def _refuse_unusable(problems: Sequence[Problem], *, num_usable: int, skip_unusable: bool) -> None:
    summary = unusable_summary(problems, num_usable=num_usable)
    if summary and not (skip_unusable and num_usable):
        hint = "; mend or remove them, or leave them out with --skip-unusable" if num_usable else ""
        raise DataError(f"{summary}{hint}")
