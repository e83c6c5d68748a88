"""An MLflow server in a process of its own, that can be killed and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.ports import free_ports


class MlflowServer:
    """Serves an sqlite file, its artifacts beside it, on one port for as long as this object lives.

    It runs the application that `mlflow server` runs, without the seconds that its command line takes.
    """

    def __init__(self, database: Path, *, host: str = "127.0.0.1") -> None:
        self.host = host
        (self.port,) = free_ports(1)
        self.uri = f"http://{host}:{self.port}"
        self._environment = {
            **os.environ,
            "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{database}",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(database.parent / "artifacts"),
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self._log = database.with_suffix(".server.log")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; `wait` until it answers."""
        where = ["--host", self.host, "--port", str(self.port)]
        command = [sys.executable, "-m", "uvicorn", *where, "mlflow.server.fastapi_app:app"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)

    def wait(self) -> None:
        """Wait until it answers."""
        assert self._process is not None
        while not self._answers():
            assert self._process.poll() is None, self._log.read_text(encoding="utf-8")
            time.sleep(0.1)

    def kill(self) -> None:
        """End it by SIGKILL, if it runs."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
            self._process = None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it runs."""
        if self._process is not None:
            self._process.send_signal(number)

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((self.host, self.port)) == 0
