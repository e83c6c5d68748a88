"""What a search over configurations found, as plain data: its parameters, its trials, and how sure the winner is.

The driver of a search makes a `SearchResult`; `pipeline.report` draws it. Neither knows the other's tools.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.ablation import VariantSummary

Value = float | int | str | bool | None
Status = Literal["finished", "stopped", "failed", "running"]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One searched key of the configuration.

    Attributes:
        name: Its dotted key: `train.loss.gamma`.
        kind: A range of `float` or `int`, or a `choice` of values.
        low: Lower end of a range.
        high: Upper end of a range.
        is_log: Whether the range is searched, and drawn, on a logarithmic scale.
        choices: The values of a choice, in order.
        default: What the search's base configuration holds.
    """

    name: str
    kind: Literal["float", "int", "choice"]
    low: float | None = None
    high: float | None = None
    is_log: bool = False
    choices: tuple[Value, ...] = ()
    default: Value = None


@dataclass(frozen=True, kw_only=True)
class SearchTrial:
    """One training of a search.

    Attributes:
        name: `trial-0007`; names its folder and its run in MLflow as well.
        values: What was set, by the parameter's name; a parameter whose condition did not hold is absent. With
            population-based training the values at the end.
        status: `finished` trained all epochs (or stopped for itself), `stopped` was ended by the scheduler, `failed`
            raised an error each time that it was tried.
        evaluations: Numbers of each evaluation in order: `epoch`, `step`, `loss`, `recall_at_1`, ...
        seconds: Time that it computed, over all tries.
        reason: Why it failed, in one line; empty otherwise.
        donor: With population-based training, the trial whose weights it took last; empty otherwise.
        run_id: Its run in MLflow.
    """

    name: str
    values: Mapping[str, Value]
    status: Status
    evaluations: tuple[Mapping[str, float], ...] = ()
    seconds: float = 0.0
    reason: str = ""
    donor: str = ""
    run_id: str = ""

    def best(self, metric: str) -> float | None:
        """Return the highest value of a metric over the evaluations; None before the first."""
        return max((evaluation[metric] for evaluation in self.evaluations), default=None)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """A whole search.

    Attributes:
        name: The search's name.
        about: One sentence: which pairs, which searcher and scheduler, which budget.
        metric: What trials are compared by; larger is better.
        parameters: What was searched.
        trials: In the order of their numbers.
        best: Name of the winning trial; empty if no trial has an evaluation.
        comparison: The default (the reference) and the winner, each trained with seeds that the search did not use;
            empty if that was not asked for.
        chance: Recall@1 of a guess; None for other metrics.
        rungs: Epochs at which the scheduler compared trials.
    """

    name: str
    about: str
    metric: str
    parameters: tuple[Parameter, ...]
    trials: tuple[SearchTrial, ...]
    best: str = ""
    comparison: tuple[VariantSummary, ...] = ()
    chance: float | None = None
    rungs: tuple[int, ...] = ()
