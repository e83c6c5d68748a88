"""A job as a process of its own, for benches."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_job(command: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a job with its arguments to its end, and return its result."""
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{command[0]}", *command[1:]],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
