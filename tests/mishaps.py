"""Trainings on Ray whose steps are noted, in a thread or in a driver process that can be killed; how they ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import safetensors.torch
import torch

from cvft.checkpoint import MODEL_FILE, TRAINING_FILE, read_info, read_state
from cvft.distributed import current_world
from jobs import train
from jobs.config import ExperimentConfig, load
from jobs.training import ray_train, worker

ROOT = Path(__file__).parents[1]
PAUSE_S = 0.15  # after each step of the tiny network, so that a mishap meets the training in the middle


train_as_usual = worker.train


def train_and_note(config: ExperimentConfig, **hooks: Any) -> bool:
    """Train as `jobs.training.worker` does, and note each step: mishaps are timed, and wasted steps counted, by it."""
    also = hooks.pop("on_step", None)
    world = current_world()
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    place = {"rank": world.rank, "size": world.size, "pid": os.getpid(), "node": node}

    def on_step(report: Any) -> None:
        if also is not None:
            also(report)
        with Path(config.output, f"{config.name}.trace").open("a") as trace:
            print(json.dumps({**place, "step": report.step}), file=trace)
        time.sleep(PAUSE_S)

    return train_as_usual(config, on_step=on_step, **hooks)


def traced_worker(settings: dict[str, Any]) -> str:
    """Be a Ray Train worker whose steps are noted."""
    worker.train = train_and_note
    try:
        return ray_train._run_worker(settings)
    finally:
        worker.train = train_as_usual


class Runs:
    """Where trainings are written, and how they are configured."""

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self.folder = folder
        self._overrides = [*overrides, f"output={folder}"]

    def overrides(self, name: str, workers: int | list[int]) -> list[str]:
        """Return what to give `train` as overrides of the preset."""
        return [*self._overrides, f"name={name}", f"train.workers={workers}"]

    def steps(self, name: str) -> list[dict[str, Any]]:
        """Return what the ranks noted, oldest first."""
        trace = self.folder / f"{name}.trace"
        # A killed process may have left half a line.
        lines = trace.read_text().splitlines() if trace.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def num_wasted(self, name: str) -> int:
        """Return how many steps were done once more."""
        steps = [line["step"] for line in self.steps(name) if line["rank"] == 0]
        return len(steps) - len(set(steps))


class Training:
    """A training in a thread of this process, or in a driver process of its own that can be killed."""

    def __init__(
        self,
        runs: Runs,
        name: str,
        workers: int | list[int],
        *,
        has_process: bool = False,
        further: Iterable[str] = (),
    ) -> None:
        self._runs = runs
        self.name = name
        self.began = time.monotonic()
        self._errors: list[BaseException] = []
        self._thread: threading.Thread | None = None
        overrides = [*runs.overrides(name, workers), *further]
        if has_process:
            command = [sys.executable, __file__, "--config", "town", *overrides]
            log = (runs.folder / f"{name}.log").open("a")
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        else:
            self._thread = threading.Thread(target=self._train, args=[load("town", overrides)])
            self._thread.start()

    def _train(self, config: ExperimentConfig) -> None:
        try:
            train.train(config)
        except BaseException as error:  # noqa: BLE001 (raised by `wait`)
            self._errors.append(error)

    def is_running(self) -> bool:
        return self._thread.is_alive() if self._thread is not None else self.process.poll() is None

    def wait_for_step(self, step: int) -> list[dict[str, Any]]:
        """Wait until rank 0 has done this step; return what the ranks of its group noted last."""
        while True:
            steps = self._runs.steps(self.name)
            if any(line["rank"] == 0 and line["step"] >= step for line in steps):
                return list({line["rank"]: line for line in steps}.values())
            if not self.is_running():
                raise SystemExit(f"{self.name} ended before step {step}; {self._errors}, see {self._runs.folder}")
            time.sleep(0.01)

    def wait_for_size(self, num_workers: int) -> None:
        """Wait until a group of so many workers has done a step, or the end."""
        while self.is_running() and all(line["size"] != num_workers for line in self._runs.steps(self.name)):
            time.sleep(0.01)

    def kill_driver(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self) -> float:
        """Wait for the end and return the seconds since the beginning."""
        if self._thread is not None:
            self._thread.join()
            if self._errors:
                raise self._errors[0]
        elif self.process.wait() != 0:
            raise SystemExit((self._runs.folder / f"{self.name}.log").read_text())
        return time.monotonic() - self.began


@dataclass(frozen=True)
class Final:
    """Where a training ended."""

    losses: torch.Tensor
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    recalls: list[dict[str, float]]

    @classmethod
    def of(cls, runs: Runs, name: str) -> Final:
        newest = max((runs.folder / name / "checkpoints").glob("step-*"))
        curve = read_state(newest, "curve")
        assert curve is not None
        epochs = read_info(newest).training["epochs"]
        return cls(
            losses=curve.tensors["losses"],
            weights=safetensors.torch.load_file(newest / MODEL_FILE),
            optimizer=safetensors.torch.load_file(newest / TRAINING_FILE),
            recalls=[{key: value for key, value in epoch.items() if key != "pairs_per_s"} for epoch in epochs],
        )

    def equals(self, other: Final) -> bool:
        """Tell whether it is the same to the bit."""
        pairs = (self.weights, other.weights), (self.optimizer, other.optimizer)
        is_same = all(ours.keys() == theirs.keys() for ours, theirs in pairs) and all(
            torch.equal(ours[name], theirs[name]) for ours, theirs in pairs for name in theirs
        )
        return is_same and torch.equal(self.losses, other.losses) and self.recalls == other.recalls

    def differences(self, other: Final) -> tuple[float, float]:
        """Return the largest difference of a step's loss and of a weight."""
        if len(self.losses) != len(other.losses):
            return float("inf"), float("inf")
        weights = max(float((self.weights[name] - other.weights[name]).abs().max()) for name in other.weights)
        return float((self.losses - other.losses).abs().max()), weights


if __name__ == "__main__":  # the driver of a training: `python -m jobs.train`, whose steps are noted
    ray_train._run_worker = traced_worker
    worker.train = train_and_note  # where one worker trains in the driver itself
    sys.exit(train.entry.main(train.JOB, sys.argv[1:]))
