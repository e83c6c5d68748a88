"""Which code ran: the commit of this checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path


def code_commit() -> str | None:
    """Return the commit, with `-dirty` where tracked files differ from it; none outside a git checkout."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None  # no git on this machine
    return done.stdout.strip() or None
