"""The code that a job on a cluster runs: what git would keep of a checkout, as one archive of the same bytes."""

from __future__ import annotations

import os
import subprocess
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from cvft.errors import ConfigError

MAX_BYTES = 100 * 2**20
"""Ray takes 512 MiB and unpacks them on every node; code is not near either."""
_UNKEPT = ("data", "demo", "runs", "mlruns", "node_modules", "build", "dist", "__pycache__", "venv", "*.egg-info", ".*")
_NUM_NAMED = 3
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the least that the format holds: the same files give the same bytes, sent once


def collect(folder: Path, *, exclude: Sequence[str] = ()) -> list[str]:
    """List the files to send, relative to `folder`: those git tracks or would, else all but data, caches and dot files.

    Args:
        folder: Top of a checkout.
        exclude: Patterns of paths that stay here as well, as of a shell: `tests`, `*.png`.

    Raises:
        ConfigError: The folder does not hold the jobs, or the files are too many bytes to be code.
    """
    if not (folder / "jobs" / "__init__.py").is_file():
        raise ConfigError(f"--working-dir {folder}: no jobs/ here; name the checkout, or `none` for what nodes hold")
    names = _of_git(folder) if (folder / ".git").exists() else _of_walk(folder)
    names = sorted(name for name in names if not _is_excluded(name, exclude) and (folder / name).is_file())
    size = sum((folder / name).stat().st_size for name in names)
    if size > MAX_BYTES:
        largest = _largest(folder, names)
        raise ConfigError(
            f"--working-dir {folder}: {size / 1e6:,.0f} MB are no code (most: {largest}); keep data outside, "
            "ignore it in .gitignore, or name it with --exclude"
        )
    return names


def pack(folder: Path, names: Iterable[str], archive: Path) -> int:
    """Write the files to a zip archive and return its size in bytes."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as package:
        for name in names:
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o755 if os.access(folder / name, os.X_OK) else 0o644) << 16
            package.writestr(entry, (folder / name).read_bytes())
    return archive.stat().st_size


def _of_git(folder: Path) -> list[str]:
    command = ["git", "-C", str(folder), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return _of_walk(folder)  # no git on this machine
    if done.returncode != 0:
        raise ConfigError(f"--working-dir {folder}: git cannot list its files: {done.stderr.strip()}")
    return [name for name in done.stdout.split("\0") if name]


def _of_walk(folder: Path) -> list[str]:
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not any(fnmatch(name, pattern) for pattern in _UNKEPT)]
        names += [str(Path(root, name).relative_to(folder)) for name in files if not name.startswith(".")]
    return names


def _is_excluded(name: str, patterns: Sequence[str]) -> bool:
    places = [name, *map(str, Path(name).parents)]
    return any(fnmatch(place, pattern.rstrip("/")) for pattern in patterns for place in places)


def _largest(folder: Path, names: Iterable[str]) -> str:
    sizes: Counter[str] = Counter()
    for name in names:
        sizes[name.split("/")[0]] += (folder / name).stat().st_size
    return ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in sizes.most_common(_NUM_NAMED))
