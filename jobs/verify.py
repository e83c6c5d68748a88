"""Hold shards against their manifest, and write damaged ones again where the raw data is at hand.

python -m jobs.verify --manifest s3://bucket/cvusa --repair --root CVUSA
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

from cvft.configuration import require
from jobs import entry
from jobs.validate import LAYOUTS
from pipeline.manifest import Manifest
from pipeline.repair import RepairReport, repair
from pipeline.verify import VerifyReport, verify


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--manifest", required=True, help="the store, or one of its manifests")
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--sample", type=int, metavar="N", help="read N pairs by range instead of all shards")
    how_much.add_argument("--fraction", type=float, metavar="F", help="read this fraction of the pairs likewise")
    how_much.add_argument("--quick", action="store_true", help="look at sizes and sidecars, read no shard")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pairs")
    parser.add_argument("--threads", type=int, default=4, help="shards read at a time (default: 4)")
    parser.add_argument("--repair", action="store_true", help="write what is damaged again, from --root")
    parser.add_argument("--root", help="the raw data: a folder, a table or s3://bucket/prefix")
    parser.add_argument("--layout", choices=LAYOUTS, default="auto", help="the raw data's")
    parser.add_argument("--split", help="split of a table that has no split column, as it was sharded")


def _resolve(arguments: argparse.Namespace) -> dict[str, Any]:
    require(arguments.repair == (arguments.root is not None), "--repair and --root go together: name both or neither")
    _num_sampled(arguments, 1)
    return entry.plain(arguments)


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    _resolve(arguments)
    manifest = Manifest.load(arguments.manifest)
    found = verify(
        manifest,
        num_sampled=_num_sampled(arguments, manifest.pairs.num_rows),
        seed=arguments.seed,
        num_threads=arguments.threads,
        progress=entry.Progress("verifying"),
    )
    for damage in found.damages:
        entry.LOGGER.warning("%s", damage)
    result = {
        "manifest": manifest.uri,
        "digest": manifest.digest,
        "shards": found.num_shards,
        "pairs": manifest.pairs.num_rows,
        "pairs_read": found.num_pairs,
        "bytes_read": found.num_bytes,
        "damages": found.kinds,
        "damaged": [{"path": item.path, "key": item.key, "kind": item.kind} for item in found.damages],
    }
    if not found.damages:
        return {**result, "ok": True}
    if not arguments.repair:
        raise entry.FailedResultError(_summary(found), result={**result, "ok": False})
    return _repair(arguments, manifest, found, result)


def _repair(
    arguments: argparse.Namespace, manifest: Manifest, found: VerifyReport, result: dict[str, Any]
) -> dict[str, Any]:
    done: RepairReport = repair(
        manifest,
        found.damages,
        arguments.root,
        layout=arguments.layout,
        split=arguments.split,
        progress=entry.Progress("repairing", unit="shards"),
    )
    for path in done.repaired:
        entry.LOGGER.info("%s: repaired", path)
    for path, reason in done.failed.items():
        entry.LOGGER.warning("%s: left as it is: %s", path, reason)
    result |= {"repaired": list(done.repaired), "not_repaired": dict(done.failed), "ok": not done.failed}
    if done.failed:
        path, reason = next(iter(done.failed.items()))
        message = f"{len(done.repaired)} damaged files are repaired, {len(done.failed)} are not; {path}: {reason}"
        raise entry.FailedResultError(message, result=result)
    return result


def _num_sampled(arguments: argparse.Namespace, num_pairs: int) -> int | None:
    if arguments.quick:
        return 0
    if arguments.fraction is None:
        return None if arguments.sample is None else int(arguments.sample)
    fraction = float(arguments.fraction)
    require(0 < fraction <= 1, f"--fraction {fraction} must lie in (0, 1]")
    return math.ceil(fraction * num_pairs)


def _summary(found: VerifyReport) -> str:
    kinds = ", ".join(f"{kind} {count}" for kind, count in found.kinds.items())
    advice = "write it again from the raw data with --repair --root, or shard again"
    return f"damaged: {kinds}; first: {found.damages[0]}; {advice}"


JOB = entry.Job(
    name="verify",
    summary="Hold shards against their manifest: sizes, hashes, index, every image; exit code 2 if one is damaged.",
    example="cvft verify --manifest demo/shards",
    add_arguments=_add_arguments,
    run=_run,
    resolve=_resolve,
    state="the store",
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
