"""The hosts of `infra/local/hosts.sh`, a job on them, and what can be seen of both from outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from tests.mishaps import ROOT
from tests.mlflow_server import MlflowServer

HOSTS = str(ROOT / "infra" / "local" / "hosts.sh")
STORE = str(ROOT / "infra" / "objectstore" / "radosgw.sh")
THIS_MACHINE, STORE_PORT = "10.77.0.254", "9400"
ADDRESSES = {"10.77.0.11": "a", "10.77.0.12": "b"}
HEALTH = {"period": "1000", "timeout": "1500", "initial_delay": "2000"}
WAYS = (("REQUEST", "CALCULATION"), ("RESPONSE", "VALIDATION"))
LIMIT_S = 400.0


def traffic() -> dict[str, int]:
    """Bytes that each host has sent, as this machine's end of its link counts them."""
    counter = "/sys/class/net/cvft-{}/statistics/rx_bytes"
    return {host: int(Path(counter.format(host)).read_text()) for host in ADDRESSES.values()}


@contextlib.contextmanager
def hosts(out: Path, folder: Path) -> Iterator[dict[str, str]]:
    """Have the hosts, a store and an MLflow server; the environment by which they are reached."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "MLFLOW_"))
    }
    environment.pop("PYTHONPATH", None)  # the nodes take the code that is sent
    environment |= {"PYTHON": sys.executable, "ADDRESS": THIS_MACHINE, "OMP_NUM_THREADS": "1"}
    environment |= {f"RAY_health_check_{name}_ms": value for name, value in HEALTH.items()}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("RAY_health_check_")}
    for left in (folder, Path(f"{folder}-store")):
        if left.exists():
            raise SystemExit(f"{left}: left by a run that went wrong; look at its logs, and delete it")
    (out / "mlflow-hosts.db").unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:

        def start(*command: str) -> None:
            stack.callback(subprocess.run, [command[0], "stop", command[2]], check=True)
            started = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            exports = (line.removeprefix("export ").partition("=") for line in started.stdout.splitlines())
            environment.update({name: value for name, _, value in exports})

        start(HOSTS, "start", str(folder))
        start(STORE, "start", str(folder) + "-store", STORE_PORT)
        environment |= {f"AWS_{way}_CHECKSUM_{what}": "when_required" for way, what in WAYS}
        os.environ.update({name: value for name, value in environment.items() if name.startswith(("RAY_", "AWS_"))})
        server = MlflowServer(out / "mlflow-hosts.db", host=THIS_MACHINE)
        server.start()
        stack.callback(server.kill)
        server.wait()
        yield environment | {"MLFLOW_TRACKING_URI": server.uri}
    for name in (folder, Path(f"{folder}-store")):  # where it went wrong, the logs stay
        shutil.rmtree(name)


class Job(threading.Thread):
    """A training submitted from the third host; each line that its follower sees is kept with its time."""

    def __init__(self, name: str, train: list[str], *, out: Path, folder: Path, environment: dict[str, str]) -> None:
        super().__init__(daemon=True)
        self.name, self._log = name, (out / f"{name}.log").open("w")
        self.lines: list[tuple[float, str]] = []
        submit = ["-m", "jobs.submit", "--name", name, "--env", "AWS_*", "--env", "OMP_NUM_THREADS", *train]
        command = [HOSTS, "on", str(folder), "user", sys.executable, *submit]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT)
        self.began_s = time.time()
        self.start()

    def run(self) -> None:
        assert self.process.stdout is not None
        for data in self.process.stdout:
            line = re.sub(r"\x1b\[\d*m", "", data.decode()).rstrip()
            self.lines.append((time.time(), line))
            print(f"{time.time() - self.began_s:6.1f} {line}", file=self._log, flush=True)

    def found(self, pattern: str, *, after_s: float = 0.0) -> tuple[float, str] | None:
        """The first line of the log that has a pattern."""
        return next(((at, line) for at, line in self.lines if at >= after_s and re.search(pattern, line)), None)

    def wait_for(self, what: Callable[[], Any]) -> Any:
        """Wait until something is there, while the job runs."""
        deadline = time.monotonic() + LIMIT_S
        while not (found := what()):
            assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}; see its log"
            assert time.monotonic() < deadline, f"{self.name}: this did not come within {LIMIT_S:.0f} s; see its log"
            time.sleep(0.1)
        return found

    def ranks(self) -> dict[int, str]:
        """Which host each rank of the newest group is on."""
        groups = [0, *(number for number, (_, line) in enumerate(self.lines) if "Started training worker" in line)]
        pattern = re.compile(r"\(ip=([\d.]+), pid=\d+\) world_rank=(\d+)")
        found = (pattern.search(line) for _, line in self.lines[groups[-1] :])
        return {int(match[2]): ADDRESSES[match[1]] for match in found if match}


class Bucket:
    """What the trainings publish. Its versions are not kept: Ceph 16 refuses every conditional write then."""

    def __init__(self) -> None:
        import boto3  # noqa: PLC0415 (reads the environment)

        self._s3 = boto3.client("s3")
        self._s3.create_bucket(Bucket="cvft")
        self._seen: dict[str, set[tuple[float, int]]] = {}

    def put(self, folder: Path) -> None:
        """Copy a store of shards to `data`."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self._s3.upload_file(str(path), "cvft", f"data/{path.relative_to(folder)}")

    def published(self, name: str) -> list[tuple[float, int]]:
        """When which checkpoint became whole, each time that it did and was seen here."""
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket="cvft", Prefix=f"runs/{name}/checkpoints/")
        objects = (item for page in pages for item in page.get("Contents", []))
        whole = (item for item in objects if item["Key"].endswith("/checkpoint.json"))
        seen = self._seen.setdefault(name, set())
        seen.update((item["LastModified"].timestamp(), int(item["Key"].split("/")[-2][5:])) for item in whole)
        return sorted(seen)

    def fetch(self, name: str, folder: Path) -> None:
        """Copy the newest checkpoint of a training to where `Final` reads it."""
        checkpoint = f"runs/{name}/checkpoints/step-{self.published(name)[-1][1]:08d}/"
        for item in self._s3.list_objects_v2(Bucket="cvft", Prefix=checkpoint)["Contents"]:
            target = folder / item["Key"].removeprefix("runs/")
            target.parent.mkdir(parents=True, exist_ok=True)
            self._s3.download_file("cvft", item["Key"], str(target))


class Nodes(threading.Thread):
    """Looks twice a second at which hosts Ray takes for alive."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, dict[str, int]]] = []
        self.nodes: list[Any] = []
        self._is_over = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.join()

    def run(self) -> None:
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
        nodes = f"{os.environ['RAY_API_SERVER_ADDRESS']}/api/v0/nodes?detail=1"
        request = urllib.request.Request(nodes, headers={"Authorization": f"Bearer {token}"})
        while not self._is_over.wait(0.5):
            with urllib.request.urlopen(request, timeout=30) as reply:
                found = json.load(reply)["data"]["result"]["result"]
            self.nodes = [node for node in found if node["node_ip"] in ADDRESSES]
            alive = [ADDRESSES[node["node_ip"]] for node in self.nodes if node["state"] == "ALIVE"]
            self.samples.append((time.time(), {host: alive.count(host) for host in ADDRESSES.values()}))

    def lost_s(self, host: str, after_s: float) -> float | None:
        """When Ray gave a host up."""
        ends = (node["end_time_ms"] / 1000 for node in self.nodes if ADDRESSES[node["node_ip"]] == host)
        return next((end for end in sorted(ends) if end > after_s), None)

    def back_s(self, host: str, after_s: float) -> float | None:
        """When a host was a node again."""
        starts = (node["start_time_ms"] / 1000 for node in self.nodes if ADDRESSES[node["node_ip"]] == host)
        return next((start for start in sorted(starts) if start > after_s), None)
