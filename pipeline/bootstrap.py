"""The difference between two recalls, with an interval: a paired bootstrap over the queries.

Each resample draws queries with replacement and takes both models' answers to them, so that what is hard for both
cancels (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13: percentile interval). Queries that
share a reference are drawn together, since their answers are not independent.

A resample's mean depends only on how often each kind of cluster (sum of its differences, number of its queries) was
drawn, and that is multinomial. So the counts are drawn instead of the queries: the same distribution, a result that
cannot depend on the queries' order, and a time that does not grow with their number.

Shape letters: N queries, G clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

BoolArray: TypeAlias = npt.NDArray[np.bool_]
IntArray: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How a difference is judged.

    Attributes:
        confidence: Of the interval, and of the exact test beside it.
        num_resamples: Number of resamples.
        seed: Of their draws.
        location: int64 [N], equal for queries that share their reference; None if every query has its own.
    """

    confidence: float = 0.95
    num_resamples: int = 10_000
    seed: int = 0
    location: IntArray | None = None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A candidate's R@1 less another one, all as fractions.

    Attributes:
        gain: As measured.
        low: Lower end of the bootstrap's interval.
        high: Its upper end.
        wins: Clusters of queries in which the candidate finds more than the other; without shared references a cluster
            is one query.
        losses: Those in which it finds fewer.
        p_value: Of the exact two-sided sign test on wins and losses (McNemar's); against chance of the exact binomial
            test.
        confidence: Of the interval.
    """

    gain: float
    low: float
    high: float
    wins: int
    losses: int
    p_value: float
    confidence: float

    @property
    def is_tie(self) -> bool:
        """Whether the two cannot be told apart.

        A percentile interval is too narrow where few queries differ: four wins and no loss keep it above 0, yet of all
        sequences of four coins one in eight is as one-sided. So the exact test has to agree.
        """
        return self.low <= 0 <= self.high or self.p_value > 1 - self.confidence


def compare(candidate_hits: BoolArray, champion_hits: BoolArray, how: Bootstrap) -> Difference:
    """Compare two models on the same queries.

    Args:
        candidate_hits: bool [N], whether the candidate has the true reference first.
        champion_hits: bool [N], the same of the champion, in the same order.
        how: Confidence, resamples, seed, and which queries belong together.
    """
    values, sizes = _clusters(candidate_hits.astype(np.int64) - champion_hits.astype(np.int64), how.location)
    wins, losses = int((values > 0).sum()), int((values < 0).sum())
    p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    gain, low, high = _interval(values, sizes, how)
    return Difference(
        gain=gain, low=low, high=high, wins=wins, losses=losses, p_value=p_value, confidence=how.confidence
    )


def compare_with_chance(hits: BoolArray, chance: float, how: Bootstrap) -> Difference:
    """Compare a model's R@1 with that of a random order.

    Args:
        hits: bool [N], whether the true reference is first.
        chance: R@1 of a random order.
        how: As in `compare`.
    """
    values, sizes = _clusters(hits.astype(np.int64), how.location)
    recall, low, high = _interval(values, sizes, how)
    return Difference(
        gain=recall - chance,
        low=low - chance,
        high=high - chance,
        wins=int((values > 0).sum()),
        losses=int((values == 0).sum()),
        p_value=float(binomtest(int(hits.sum()), len(hits), chance).pvalue),
        confidence=how.confidence,
    )


def _clusters(values: IntArray, location: IntArray | None) -> tuple[IntArray, IntArray]:
    """Return the sum of the values and the number of queries of each cluster, both [G]."""
    if location is None:
        return values, np.ones_like(values)
    _, cluster, sizes = np.unique(location, return_inverse=True, return_counts=True)
    sums = np.zeros_like(sizes)
    np.add.at(sums, cluster, values)
    return sums, sizes


def _interval(values: IntArray, sizes: IntArray, how: Bootstrap) -> tuple[float, float, float]:
    """Return the mean over all queries and the ends of its interval."""
    kinds, counts = np.unique(np.stack([values, sizes]), axis=1, return_counts=True)
    random = np.random.default_rng(how.seed)
    drawn = random.multinomial(len(values), counts / len(values), size=how.num_resamples)
    means = (drawn @ kinds[0]) / (drawn @ kinds[1])
    tail = (1 - how.confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(values.sum() / sizes.sum()), float(low), float(high)
