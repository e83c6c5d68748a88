"""What a training remembers of its way: the loss of every step, the numbers of every evaluation, the best so far."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from cvft.averaging import WeightAverage
from cvft.checkpoint import CheckpointInfo, State
from cvft.engine import StepReport
from jobs.entry import LINE_INTERVAL_S, LOGGER
from jobs.resources import memory_text
from pipeline.checkpoints import checkpoint_name

Metrics = dict[str, float]


class StateOwner(Protocol):
    """A part of a training with state of its own, which goes into every checkpoint under the owner's name."""

    def state(self) -> State:
        """Return what the part needs to go on; only asked on rank 0."""

    def restore(self, state: State) -> None:
        """Take a state back, on every rank."""


@dataclass(frozen=True, kw_only=True)
class History:
    """The evaluations of a training; plain JSON within each checkpoint.

    Attributes:
        epochs: Numbers of each evaluated epoch.
        best: Name of the checkpoint with the highest R@1, the first of equals.
        best_recall_at_1: Its R@1.
    """

    epochs: list[Metrics] = field(default_factory=list)
    best: str = ""
    best_recall_at_1: float = -1.0

    def then(self, metrics: Metrics) -> History:
        """Return the history with one more evaluation."""
        is_better = metrics["recall_at_1"] > self.best_recall_at_1
        return History(
            epochs=[*self.epochs, metrics],
            best=checkpoint_name(int(metrics["step"])) if is_better else self.best,
            best_recall_at_1=max(metrics["recall_at_1"], self.best_recall_at_1),
        )

    @property
    def best_metrics(self) -> Metrics:
        """Numbers of the best evaluation."""
        (found,) = (metrics for metrics in self.epochs if checkpoint_name(int(metrics["step"])) == self.best)
        return found

    def has_evaluated(self, epoch: int) -> bool:
        """Tell whether the evaluation after so many epochs is done."""
        return any(metrics["epoch"] == epoch for metrics in self.epochs)

    def is_stalled(self, patience: int | None) -> bool:
        """Tell whether the last `patience` evaluations brought nothing better; never without a patience."""
        if patience is None or not self.epochs:
            return False
        return len(self.epochs) - 1 - self.epochs.index(self.best_metrics) >= patience

    def is_finished(self, *, num_epochs: int, patience: int | None) -> bool:
        """Tell whether there is nothing left to train: a function of the evaluations alone, whoever resumes."""
        return self.has_evaluated(num_epochs) or self.is_stalled(patience)


class Curve:
    """The loss of every step since the beginning, and the time spent on the epoch under way.

    It travels with the checkpoints, so that the curve and the mean over an epoch are those of a training that was never
    interrupted.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._seconds = 0.0
        self._since = time.monotonic()

    def begin_epoch(self) -> None:
        """Count the time of a new epoch."""
        self._seconds, self._since = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent on the epoch, by this process and those before it."""
        return self._seconds + time.monotonic() - self._since

    def mean(self, first: int, last: int) -> float:
        """Return the mean loss of the steps from `first` until before `last`."""
        return sum(self.losses[first:last]) / (last - first)

    def state(self) -> State:
        """Return the losses as float64, exactly, and the seconds."""
        losses = torch.tensor(self.losses, dtype=torch.float64)
        return State(values={"epoch_seconds": self.seconds}, tensors={"losses": losses})

    def restore(self, state: State) -> None:
        """Go on from a state."""
        self.losses = state.tensors["losses"].tolist()
        self._seconds, self._since = state.values["epoch_seconds"], time.monotonic()


class AverageOwner:
    """Carries what a checkpoint with averaged weights lacks: the weights as the optimizer left them."""

    def __init__(self, average: WeightAverage) -> None:
        self._average = average

    def state(self) -> State:
        """Return the trained parameters."""
        return State(tensors=self._average.raw())

    def restore(self, state: State) -> None:
        """Go on from a state; the network holds the averaged weights of the same checkpoint."""
        self._average.restore(state.tensors)


class StepLines:
    """One log line at intervals while steps go by."""

    def __init__(self, num_steps: int, device: torch.device) -> None:
        self._num_steps = num_steps
        self._device = device
        self._printed = time.monotonic()

    def __call__(self, report: StepReport) -> None:
        """Perhaps print a line."""
        if time.monotonic() - self._printed < LINE_INTERVAL_S:
            return
        self._printed = time.monotonic()
        LOGGER.info(
            "step %d/%d: loss %.4f, %.1f pairs/s, waited %.0f %% for data, %s",
            report.step + 1,
            self._num_steps,
            report.loss,
            report.pairs_per_s,
            100 * report.data_wait_s / (report.data_wait_s + report.step_s),
            memory_text(self._device),
        )


def log_evaluation(metrics: Metrics, num_epochs: int) -> None:
    """Print the numbers of an evaluation as one line."""
    LOGGER.info(
        "epoch %d/%d: loss %.4f, R@1 %.2f %%, R@5 %.2f %%, R@10 %.2f %%, %.1f pairs/s",
        metrics["epoch"],
        num_epochs,
        metrics["loss"],
        *(100 * metrics[f"recall_at_{k}"] for k in (1, 5, 10)),
        metrics["pairs_per_s"],
    )


def read_history(info: CheckpointInfo) -> list[dict[str, Any]]:
    """Return the numbers of each evaluated epoch up to a checkpoint; none for imported weights."""
    return list(info.training.get("epochs", []))
