"""Several trainings of each variant, compared: means, deviations over seeds, and how sure a difference is.

Every variant is trained with the same seeds, and a seed fixes the initial weights and the order of the pairs. So the
difference to the reference is taken seed by seed, and its interval is Student's for paired samples. It tells how much
luck is in a training; the queries are the same everywhere, so it says nothing about other places.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from cvft.errors import DataError

CONFIDENCE = 0.95
RECALLS = ("recall_at_1", "recall_at_5", "recall_at_10", "recall_at_1_percent")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training.

    Attributes:
        variant: Its variant's name.
        seed: Its seed.
        metrics: Numbers at its end; recalls as fractions.
    """

    variant: str
    seed: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class VariantSummary:
    """All trainings of a variant.

    Attributes:
        variant: Its name.
        values: The metric that variants are compared by, by seed.
        means: Mean over the seeds of each of `RECALLS` and of the metric.
        deviations: Their standard deviations; None with one seed.
        difference: Mean difference of the metric to the reference's, over the seeds that both have; None of itself.
        half_width: Half of its 95 % interval; None with one seed.
    """

    variant: str
    values: Mapping[int, float]
    means: Mapping[str, float]
    deviations: Mapping[str, float | None]
    difference: float | None
    half_width: float | None

    @property
    def verdict(self) -> str:
        """Say in words what the difference is worth."""
        if self.difference is None:
            return "reference"
        if self.half_width is None:
            return "one seed tells nothing"
        if abs(self.difference) <= self.half_width:
            return "within the noise"
        return "better" if self.difference > 0 else "worse"

    def plain(self) -> dict[str, Any]:
        """Return it as plain JSON data."""
        return {
            "variant": self.variant,
            "values": {str(seed): value for seed, value in self.values.items()},
            "means": dict(self.means),
            "deviations": dict(self.deviations),
            "difference": self.difference,
            "half_width": self.half_width,
            "verdict": self.verdict,
        }


def summarise(trials: Sequence[Trial], *, reference: str, metric: str = "recall_at_1") -> list[VariantSummary]:
    """Compare all variants with one of them, in the order of their first trials.

    Args:
        trials: Of all variants.
        reference: The variant that the others are compared with.
        metric: What they are compared by; larger is better.

    Raises:
        DataError: The reference has no trial, or a variant has no seed in common with it.
    """
    by_variant: dict[str, dict[int, Trial]] = {}
    for trial in trials:
        by_variant.setdefault(trial.variant, {})[trial.seed] = trial
    if reference not in by_variant:
        raise DataError(f"reference: {reference!r} was not trained; variants: {', '.join(by_variant)}")
    known = {seed: trial.metrics[metric] for seed, trial in by_variant[reference].items()}
    summaries = []
    for variant, of_seed in by_variant.items():
        values = {seed: of_seed[seed].metrics[metric] for seed in sorted(of_seed)}
        columns = {
            name: [trial.metrics[name] for trial in of_seed.values()] for name in dict.fromkeys([*RECALLS, metric])
        }
        difference, half_width = (None, None) if variant == reference else _paired(values, known, variant=variant)
        summaries.append(
            VariantSummary(
                variant=variant,
                values=values,
                means={name: statistics.fmean(column) for name, column in columns.items()},
                deviations={
                    name: statistics.stdev(column) if len(column) > 1 else None for name, column in columns.items()
                },
                difference=difference,
                half_width=half_width,
            )
        )
    return summaries


def _paired(values: Mapping[int, float], reference: Mapping[int, float], *, variant: str) -> tuple[float, float | None]:
    """Return the mean difference over common seeds and half of its interval by Student's distribution."""
    differences = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    if not differences:
        raise DataError(f"{variant}: no seed in common with the reference; train both with the same seeds")
    mean, number = statistics.fmean(differences), len(differences)
    if number == 1:
        return mean, None
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, number - 1))
    return mean, quantile * statistics.stdev(differences) / math.sqrt(number)
