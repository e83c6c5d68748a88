"""Whether a candidate model takes the champion's place: both measured on the same queries, and a gate of conditions.

Shape letters: N queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cvft.configuration import require
from pipeline.bootstrap import BoolArray, Bootstrap, Difference, IntArray, compare, compare_with_chance

Status = Literal["promoted", "tie", "refused"]


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What a candidate must fulfil.

    Attributes:
        min_gain: Smallest gain in R@1 over the champion, as a fraction: 0.005 is half a point.
        confidence: That the gain is above 0, by the bootstrap's interval and by the exact test.
        num_resamples: Of the bootstrap.
        seed: Of the bootstrap.
        max_deleaked_loss: Largest loss in R@1 over the queries that do not leak, as a fraction.
        max_latency_ms: Longest median time of embedding one ground image, on the machine that promotes; null is no
            limit.
        max_latency_ratio: The same as a multiple of the champion's, measured in turns with it; null is no limit.
        max_model_mb: Largest size of the model's files in megabytes (10^6 bytes); null is no limit.
        must_beat_chance: Where there is no champion yet, the candidate's R@1 must lie above a guess's, with this
            confidence.
    """

    min_gain: float = 0.005
    confidence: float = 0.95
    num_resamples: int = 10_000
    seed: int = 0
    max_deleaked_loss: float = 0.0
    max_latency_ms: float | None = None
    max_latency_ratio: float | None = 2.0
    max_model_mb: float | None = None
    must_beat_chance: bool = True

    def __post_init__(self) -> None:
        require(0 <= self.min_gain < 1, f"min_gain: {self.min_gain} is a fraction and must lie in [0, 1)")
        require(0.5 <= self.confidence < 1, f"confidence: {self.confidence} must lie in [0.5, 1)")
        require(self.num_resamples >= 1000, f"num_resamples: {self.num_resamples} must be at least 1000")
        require(self.seed >= 0, f"seed: {self.seed} must not be negative")
        loss = self.max_deleaked_loss
        require(0 <= loss <= 1, f"max_deleaked_loss: {loss} is a fraction and must lie in [0, 1]")
        for name in ("max_latency_ms", "max_latency_ratio", "max_model_mb"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}: {value} must be positive, or null for no limit")

    def bootstrap(self, location: IntArray | None = None) -> Bootstrap:
        """Return how differences are judged, see `Bootstrap`."""
        return Bootstrap(
            confidence=self.confidence, num_resamples=self.num_resamples, seed=self.seed, location=location
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of one model; both models have the same queries.

    Attributes:
        hits: bool [N], whether the true reference is first.
        is_deleaked: bool [N], the queries that do not leak; None if that is unknown.
        chance: R@1 of a random order.
        latency_ms: Median time of embedding one ground image.
        model_mb: Size of the model's files, in 10^6 bytes.
        latency_ratio: That time as a multiple of the champion's, measured in turns with it; none if it was not.
    """

    hits: BoolArray
    is_deleaked: BoolArray | None
    chance: float
    latency_ms: float
    model_mb: float
    latency_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One of the gate's conditions.

    Attributes:
        name: The key of `GateConfig` that sets it.
        holds: Whether it holds.
        text: What was found and what is asked, for people.
    """

    name: str
    holds: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate says.

    Attributes:
        status: `tie` if the two recalls cannot be told apart, whatever else failed.
        is_first: Whether there was no champion to compare with.
        difference: In R@1 over the champion, or over chance where there was none.
        deleaked: The same over the queries that do not leak; None if unknown or there was no champion.
        conditions: All of the gate's, those that hold and those that do not.
        notes: What a reader should know besides.
    """

    status: Status
    is_first: bool
    difference: Difference
    deleaked: Difference | None
    conditions: tuple[Condition, ...]
    notes: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """What decided, for people: all conditions where they hold, else those that do not."""
        decisive = [item for item in self.conditions if item.holds == (self.status == "promoted")]
        return "; ".join(item.text for item in decisive)

    def plain(self) -> dict[str, Any]:
        """Return it as plain JSON data."""
        found = self.difference
        return {
            "status": self.status,
            "reason": self.reason,
            "is_first": self.is_first,
            "gain": found.gain,
            "gain_low": found.low,
            "gain_high": found.high,
            "p_value": found.p_value,
            "wins": found.wins,
            "losses": found.losses,
            "gain_deleaked": self.deleaked.gain if self.deleaked else None,
            "conditions": {item.name: {"holds": item.holds, "text": item.text} for item in self.conditions},
            "notes": list(self.notes),
        }


def decide(
    candidate: Measured,
    champion: Measured | None,
    *,
    gate: GateConfig,
    location: IntArray | None = None,
    notes: Sequence[str] = (),
) -> Verdict:
    """Hold a candidate against the gate.

    Args:
        candidate: What was measured of it.
        champion: The same of the champion; None if there is none yet.
        gate: The conditions.
        location: int64 [N], equal for queries that share their reference; None if every query has its own.
        notes: Handed on to the verdict.
    """
    how, deleaked = gate.bootstrap(location), None
    if champion is None:
        difference = compare_with_chance(candidate.hits, candidate.chance, how)
        conditions = [_beats_chance(candidate, difference, gate)]
    else:
        difference = compare(candidate.hits, champion.hits, how)
        deleaked = _compare_deleaked(candidate, champion, how)
        conditions = [_is_better(difference, gate), _keeps_deleaked(deleaked, gate)]
    conditions += _limits(candidate, gate)
    if all(condition.holds for condition in conditions):
        status: Status = "promoted"
    else:
        status = "tie" if champion is not None and difference.is_tie else "refused"
    return Verdict(
        status=status,
        is_first=champion is None,
        difference=difference,
        deleaked=deleaked,
        conditions=tuple(conditions),
        notes=tuple(notes),
    )


def gain_text(found: Difference) -> str:
    """Say a difference and its interval in points of per cent: `+2.5 points (95 % interval +0.6 to +4.4)`."""
    low, high = _points(found.low), _points(found.high)
    return f"{_points(found.gain)} points ({found.confidence * 100:.3g} % interval {low} to {high})"


def _points(fraction: float) -> str:
    return f"{100 * fraction:+.2f}"


def _compare_deleaked(candidate: Measured, champion: Measured, how: Bootstrap) -> Difference | None:
    kept = candidate.is_deleaked
    if kept is None or not kept.any():
        return None
    how = replace(how, location=None if how.location is None else how.location[kept])
    return compare(candidate.hits[kept], champion.hits[kept], how)


def _beats_chance(candidate: Measured, found: Difference, gate: GateConfig) -> Condition:
    is_better = found.gain > 0 and not found.is_tie
    text = f"R@1 {candidate.hits.mean():.2%}, a guess {candidate.chance:.2%}: {gain_text(found)}"
    if not is_better:
        text += ", no better than a guess" + ("" if gate.must_beat_chance else ", which this gate lets pass")
    return Condition(name="must_beat_chance", holds=is_better or not gate.must_beat_chance, text=text)


def _is_better(found: Difference, gate: GateConfig) -> Condition:
    counts = f"{found.wins} queries won, {found.losses} lost, exact test p = {found.p_value:.2g}"
    text = f"R@1 {gain_text(found)} over the champion, {counts}"
    if found.is_tie:
        return Condition(name="min_gain", holds=False, text=f"{text}: the two cannot be told apart")
    if found.gain < 0:
        return Condition(name="min_gain", holds=False, text=f"{text}: worse")
    holds = found.gain >= gate.min_gain
    asked = f"the gate asks for {_points(gate.min_gain)} or more"
    return Condition(name="min_gain", holds=holds, text=f"{text}; {asked}")


def _keeps_deleaked(found: Difference | None, gate: GateConfig) -> Condition:
    if found is None:
        text = "without leaked queries: unknown, so nothing is asked"
        return Condition(name="max_deleaked_loss", holds=True, text=text)
    holds = found.gain >= -gate.max_deleaked_loss
    asked = "no loss is allowed" if gate.max_deleaked_loss == 0 else f"{_points(-gate.max_deleaked_loss)} is allowed"
    return Condition(
        name="max_deleaked_loss", holds=holds, text=f"without leaked queries {_points(found.gain)} points, {asked}"
    )


def _limits(candidate: Measured, gate: GateConfig) -> list[Condition]:
    """Return the conditions on time and size that the gate sets."""
    conditions = []
    took, ratio, size = candidate.latency_ms, candidate.latency_ratio, candidate.model_mb
    if gate.max_latency_ms is not None:
        text = f"{took:.1f} ms for a ground image, at most {gate.max_latency_ms:g} ms"
        conditions.append(Condition(name="max_latency_ms", holds=took <= gate.max_latency_ms, text=text))
    if gate.max_latency_ratio is not None and ratio is not None:
        text = f"{ratio:.2f} times the champion's time, at most {gate.max_latency_ratio:g}"
        conditions.append(Condition(name="max_latency_ratio", holds=ratio <= gate.max_latency_ratio, text=text))
    if gate.max_model_mb is not None:
        text = f"{size:.1f} MB, at most {gate.max_model_mb:g} MB"
        conditions.append(Condition(name="max_model_mb", holds=size <= gate.max_model_mb, text=text))
    return conditions
