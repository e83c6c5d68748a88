"""What telling MLflow costs a training: steps of about 30 ms with an outbox, with MLflow there, slow or away.

    python tests/bench/bench_outbox.py            # three minutes
    python tests/bench/bench_outbox.py --quick

A step is a product of matrices by one thread of torch, sized to about 30 ms on this machine. It is logged as `train`
logs it, with the default interval. `none` does not log; `up` has a real MLflow server, which computes on the other core
as it would on another machine; `slow` has the same behind a proxy that holds every answer for three seconds; `down` has
nobody listening; `direct` calls MLflow from the training's thread, as one does without an outbox. All take turns of
some seconds within each round, in an order that changes.

Prints a table and, last, one line of JSON: the time that the call itself takes of the training's thread per step, and
the medians of the steps. Exits with 1 if the call costs more than 1 % of a step, or if the median step with an outbox
is more than 1 % longer than without one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from cvft.engine import StepReport
from jobs.tracked import StepMetrics
from jobs.tracking_config import TrackingConfig
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.runs import Run, create_run
from pipeline.tracking.server import prepare
from tests.mlflow_server import MlflowServer

STEP_S = 0.030
MAX_SHARE = 0.01
SLOW_S = 3.0
INTERVAL_S = 1.0  # five times as often as a training sends
WAYS = ("none", "up", "slow", "down", "direct")
OnStep = Callable[[StepReport], None]


def make_step() -> Callable[[], None]:
    """Return work of about 30 ms."""
    torch.set_num_threads(1)
    matrix = torch.randn(512, 512)
    times = []
    for _ in range(30):
        begun = time.perf_counter()
        torch.linalg.multi_dot([matrix, matrix, matrix])
        times.append(time.perf_counter() - begun)
    repeats = max(1, round(STEP_S / statistics.median(times)))

    def step() -> None:
        for _ in range(repeats):
            torch.linalg.multi_dot([matrix, matrix, matrix])

    return step


class SlowProxy:
    """Forwards to a port and holds every answer for `SLOW_S`."""

    def __init__(self, target_port: int) -> None:
        self._target = ("127.0.0.1", target_port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(self._target)
            for source, target, delay_s in ((client, server, 0.0), (server, client, SLOW_S)):
                threading.Thread(target=self._copy, args=(source, target, delay_s), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket, delay_s: float) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(delay_s)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


class Places:
    """An MLflow server with a run for each way, and the URI by which each way reaches it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        place = prepare(f"sqlite:///{folder}/mlflow.db", experiment="bench")
        self.server = MlflowServer(folder / "mlflow.db")
        self.server.start()
        self.server.wait()
        slow = f"http://127.0.0.1:{SlowProxy(self.server.port).port}"
        uris = {"up": self.server.uri, "slow": slow, "down": "http://127.0.0.1:9", "direct": self.server.uri}
        self._runs = {
            way: Run(uri=uri, run_id=create_run(place, name=way, identity=way).run_id) for way, uri in uris.items()
        }

    @contextlib.contextmanager
    def recorder(self, way: str) -> Iterator[OnStep]:
        """Give what a way calls after a step."""
        every, device = TrackingConfig.log_every_steps, torch.device("cpu")
        if way == "none":
            yield lambda report: None
        elif way == "direct":
            yield StepMetrics(self._runs[way].log_metrics, every=every, device=device).add
        else:
            outbox = Outbox(self._runs[way], str(self._folder / way), cache=self._folder, interval_s=INTERVAL_S)
            yield StepMetrics(outbox.log_metrics, every=every, device=device).add
            outbox.close(wait_s=0.5)


def measure(rounds: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Return the times of steps and of calls by way."""
    found: dict[str, dict[str, list[float]]] = {way: {"step": [], "call": []} for way in WAYS}
    work, chance = make_step(), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        places = Places(Path(folder))
        for _ in range(rounds):
            for way in chance.sample(WAYS, len(WAYS)):
                with places.recorder(way) as on_step:
                    _take_turn(work, on_step, seconds, found[way])
        places.server.kill()
    return found


def _take_turn(work: Callable[[], None], on_step: OnStep, seconds: float, times: dict[str, list[float]]) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        step = len(times["step"])
        report = StepReport(
            step=step,
            loss=1.0 / (1 + step),
            gradient_norm=1.0,
            learning_rate=1e-5,
            pairs_per_s=100.0,
            data_wait_s=0.001,
            step_s=STEP_S,
        )
        begun = time.perf_counter()
        work()
        worked = time.perf_counter()
        on_step(report)
        done = time.perf_counter()
        times["step"].append(done - begun)
        times["call"].append(done - worked)


def main() -> int:
    """Measure, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half a minute; noisier")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    rounds, seconds = (2, 3.0) if arguments.quick else (8, 4.0)
    found = measure(rounds, seconds)
    plain = statistics.median(found["none"]["step"])
    rows = {}
    print(f"{'way':8}{'steps':>7}{'call, mean/step':>17}{'longest':>10}{'median step':>13}{'of none':>9}")
    for way in WAYS:
        steps, calls = found[way]["step"], found[way]["call"]
        row = {
            "num_steps": len(steps),
            "call_us": 1e6 * statistics.fmean(calls),
            "longest_call_ms": 1e3 * max(calls),
            "step_ms": 1e3 * statistics.median(steps),
            "share": statistics.median(steps) / plain,
        }
        rows[way] = row
        print(
            f"{way:8}{row['num_steps']:7}{row['call_us']:14.1f} us{row['longest_call_ms']:7.2f} ms"
            f"{row['step_ms']:10.3f} ms{row['share']:9.4f}"
        )
    with_outbox = [rows[way] for way in ("up", "slow", "down")]
    is_cheap = all(row["call_us"] < 1e6 * MAX_SHARE * plain and row["share"] < 1 + MAX_SHARE for row in with_outbox)
    print(json.dumps({"benchmark": "outbox", "is_met": is_cheap, **rows}))
    return 0 if is_cheap else 1


if __name__ == "__main__":
    sys.exit(main())
