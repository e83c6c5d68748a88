"""List the versions of a registered model, or copy one of them as a checkpoint.

python -m jobs.models --tracking-uri sqlite:///demo/mlflow.db
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cvft.configuration import require
from cvft.errors import ConfigError, StoreError
from jobs import entry
from jobs.promote import add_registry_arguments, check_registry_arguments
from pipeline.tracking.registry import CARD_FILE
from pipeline.tracking.versions import Registry, Version, checkpoint_of, split_model_uri

_NUMBERS = ("recall_at_1", "recall_at_1_deleaked", "gain", "gain_low", "gain_high", "latency_ms", "model_mb")
_UNKNOWN = "-"


def plain_version(version: Version) -> dict[str, Any]:
    """Return what the table shows of a version, as plain JSON; what is not known is null."""
    tags = version.tags
    return {
        "version": version.version,
        "aliases": list(version.aliases),
        "status": tags.get("validation_status", "registered"),
        **{name: float(tags[name]) if name in tags else None for name in _NUMBERS},
        "compared_with": tags.get("compared_with"),
        "data": tags.get("manifest_digest") or None,
        "evaluated_on_data": tags.get("evaluation_digest"),
        "commit": tags.get("commit"),
        "registered": datetime.fromtimestamp(version.created_s, UTC).isoformat(timespec="seconds"),
        "run_id": version.run_id,
        "description": version.description,
    }


def version_table(versions: Sequence[Mapping[str, Any]]) -> str:
    """Return versions as a table for people, newest first."""
    header = ("version", "alias", "status", "R@1", "de-leaked", "gain (interval)", "over", "image", "size", "data")
    rows = [(*header, "commit", "registered")]
    for item in reversed(versions):
        gain = f"{_points(item['gain'])} ({_points(item['gain_low'])} to {_points(item['gain_high'])})"
        rows.append(
            (
                str(item["version"]),
                " ".join(item["aliases"]),
                item["status"],
                _cell(item["recall_at_1"], "{:.2%}"),
                _cell(item["recall_at_1_deleaked"], "{:.2%}"),
                gain if item["gain"] is not None else _UNKNOWN,
                item["compared_with"] or _UNKNOWN,
                _cell(item["latency_ms"], "{:.1f} ms"),
                _cell(item["model_mb"], "{:.1f} MB"),
                (item["data"] or _UNKNOWN)[:12],
                (item["commit"] or _UNKNOWN)[:9],
                item["registered"][:16].replace("T", " "),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(f"  {line}" for line in lines)


def _points(fraction: float | None) -> str:
    return _UNKNOWN if fraction is None else f"{100 * fraction:+.2f}"


def _cell(value: float | None, form: str) -> str:
    return _UNKNOWN if value is None else form.format(value)


def fetch_version(registry: Registry, version: Version, folder: Path) -> Path:
    """Copy a version's checkpoint and its card into a new folder, which `cvft.checkpoint.load_model` reads.

    Raises:
        ConfigError: The folder is there already and holds something.
        CheckpointError: The version's files are gone or damaged.
        StoreError: The folder cannot be written.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--fetch {folder}: holds something already; name a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            files = registry.fetch(version, Path(temporary))
            whole = checkpoint_of(files)
            if (files / CARD_FILE).exists():
                shutil.copyfile(files / CARD_FILE, whole / CARD_FILE)
            whole.rename(folder)
    except OSError as error:
        raise StoreError(f"--fetch {folder}: cannot write it: {error.strerror}") from error
    return folder


def is_registered(name: str) -> bool:
    """Tell whether a checkpoint's name is a registered model's, not a path or URI."""
    return name.startswith("models:")


@contextlib.contextmanager
def named_checkpoint(name: str, tracking_uri: str) -> Iterator[tuple[str, int | None]]:
    """Give the checkpoint that a name means, and its version if it is a registered one.

    Args:
        name: A path or URI, which is given as it is, or `models:/NAME@ALIAS` or `models:/NAME/VERSION`, of which a copy
            is there as long as the block lasts.
        tracking_uri: Where MLflow keeps registered models.

    Raises:
        ConfigError: There is no such model, version or alias.
        CheckpointError: The version's files are gone or damaged.
        StoreError: MLflow cannot be asked.
    """
    if not is_registered(name):
        yield name, None
        return
    parts = split_model_uri(name)
    if parts is None:
        raise ConfigError(f"{name}: a registered model is models:/NAME@ALIAS or models:/NAME/VERSION")
    registry = Registry.at(tracking_uri, parts[0])
    version = registry.version(parts[1]) if parts[1] is not None else registry.aliased(str(parts[2]))
    if version is None:
        raise ConfigError(f"{name}: no version of {registry.name} in {registry.uri} is {parts[2]}")
    with tempfile.TemporaryDirectory() as temporary:
        yield str(checkpoint_of(registry.fetch(version, Path(temporary)))), version.version


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_registry_arguments(parser)
    parser.add_argument("--version", type=int, help="this version alone (with --fetch by default: that of --alias)")
    parser.add_argument(
        "--fetch", type=entry.local_path, metavar="FOLDER", help="copy the version's checkpoint into a new folder"
    )


def _resolve(arguments: argparse.Namespace) -> dict[str, Any]:
    check_registry_arguments(arguments)
    require(arguments.version is None or arguments.version >= 1, f"--version {arguments.version}: counted from 1 on")
    return entry.plain(arguments)


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    _resolve(arguments)
    registry = Registry.at(arguments.tracking_uri, arguments.name)
    if arguments.fetch is not None:
        version = (
            registry.aliased(arguments.alias) if arguments.version is None else registry.version(arguments.version)
        )
        if version is None:
            raise ConfigError(f"--fetch: no version of {registry.name} is {arguments.alias}; say which by --version")
        folder = fetch_version(registry, version, arguments.fetch.expanduser().absolute())
        entry.LOGGER.info("version %d of %s is in %s", version.version, registry.name, folder)
        return {"checkpoint": str(folder), **plain_version(version)}
    found = registry.versions() if arguments.version is None else [registry.version(arguments.version)]
    if not found:
        raise ConfigError(f"--name {registry.name}: no such registered model in {registry.uri}, or it has no version")
    versions = [plain_version(version) for version in found]
    entry.LOGGER.info("\n%s\n", version_table(versions))
    return {"name": registry.name, "versions": versions, "history": registry.history(arguments.alias)}


JOB = entry.Job(
    name="models",
    summary="List the versions of a registered model, or copy one of them as a checkpoint.",
    example="cvft models --tracking-uri sqlite:///demo/mlflow.db",
    add_arguments=_add_arguments,
    run=_run,
    resolve=_resolve,
    state="the registry",
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
