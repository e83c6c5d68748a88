"""Bring the champion before this one back.

python -m jobs.rollback --reason "wrong on panoramas at night" --tracking-uri sqlite:///demo/mlflow.db
"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from typing import Any

from jobs import entry
from jobs.promote import ROLLED_BACK, add_registry_arguments, check_registry_arguments
from pipeline.tracking.versions import Registry


def rollback(registry: Registry, *, alias: str, reason: str) -> dict[str, Any]:
    """Move an alias back to the version that it named before, and write down when and why on both.

    Raises:
        NothingToRollBackError: There is none before it.
        StoreError: MLflow cannot be used.
    """
    done = registry.roll_back(alias)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    gone = {"validation_status": ROLLED_BACK, "rolled_back_at": now, "rolled_back_because": reason}
    back = {"restored_at": now, "restored_because": reason, "restored_from": str(done.version_from)}
    registry.set_tags(done.version_from, gone)
    registry.set_tags(done.version_to, back)
    return {
        "rolled_back": done.version_from,
        "version": done.version_to,
        "model": f"models:/{registry.name}@{alias}",
        "reason": reason,
        "history": registry.history(alias),
    }


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reason", default="", help="why, for those who ask later")
    add_registry_arguments(parser)


def _resolve(arguments: argparse.Namespace) -> dict[str, Any]:
    check_registry_arguments(arguments)
    return entry.plain(arguments)


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    _resolve(arguments)
    registry = Registry.at(arguments.tracking_uri, arguments.name)
    result = rollback(registry, alias=arguments.alias, reason=arguments.reason)
    told = "%s of %s is version %d again, in place of version %d"
    entry.LOGGER.info(told, arguments.alias, registry.name, result["version"], result["rolled_back"])
    return result


JOB = entry.Job(
    name="rollback",
    summary="Bring the champion before this one back.",
    example="cvft rollback --reason 'wrong at night' --tracking-uri sqlite:///demo/mlflow.db",
    add_arguments=_add_arguments,
    run=_run,
    resolve=_resolve,
    state="the registry",
    is_repeatable=False,  # twice is two champions back
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
