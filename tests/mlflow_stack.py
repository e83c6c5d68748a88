"""A real MLflow server on PostgreSQL and an object store, by infra/mlflow/server.sh, in a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.ports import free_ports

SCRIPT = Path(__file__).parents[1] / "infra/mlflow/server.sh"


class MlflowStack:
    """The script's commands, on a folder that the user who runs PostgreSQL may enter."""

    def __init__(
        self, folder: Path, *, environment: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
    ) -> None:
        """Prepare to start.

        Args:
            folder: Where everything lies; one that was begun before goes on.
            environment: Of the script, beside this process's; AWS variables name an object store to use.
            prefix: Of the command, such as `nice -n 19`.
        """
        folder.chmod(0o711)
        self.folder = folder
        self._prefix = prefix
        self._environment = {**os.environ, "PYTHON": sys.executable, **(environment or {})}
        if not (folder / "port").exists():
            self._environment["PORT"] = str(free_ports(1, width=4)[0])  # of which the server's parts have the next

    def __call__(self, command: str) -> dict[str, str]:
        """Run `start`, `kill` or `stop`; return what it exports."""
        done = subprocess.run(
            [*self._prefix, SCRIPT, command, self.folder],
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=300,
            check=True,
        )
        return dict(re.findall(r"export (\w+)=(\S*)", done.stdout))

    def reason_to_skip(self) -> str:
        """Return what is missing to start it, or nothing."""
        missing = subprocess.run([SCRIPT, "check"], env=self._environment, capture_output=True, text=True, check=False)
        return missing.stderr.strip() if missing.returncode else ""
