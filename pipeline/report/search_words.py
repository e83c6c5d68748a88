"""What a search found, in plain words: the sentence at the top of its page, and how numbers are written there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from pipeline.ablation import CONFIDENCE, VariantSummary
from pipeline.report.charts import RECALLS
from pipeline.search import SearchResult, SearchTrial, Status

Kind = Literal["better", "tie", "worse", "open", "nothing"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a search.

    Attributes:
        kind: `better`, `tie` or `worse` than the default with seeds of their own; `open` without them; `nothing` if no
            trial has an evaluation.
        sentence: It in words.
        advice: What follows from it.
    """

    kind: Kind
    sentence: str
    advice: str


def outcome_of(result: SearchResult) -> Outcome:
    """Say what came out, and call a winner within the noise a tie."""
    winner = winner_of(result)
    if winner is None:
        return Outcome(
            kind="nothing",
            sentence="No trial got as far as an evaluation, so there is nothing to choose.",
            advice="Look at the reasons in the table of trials.",
        )
    compared = comparison_of(result)
    return _open_outcome(result, winner) if compared is None else _compared_outcome(result, winner, *compared)


def _open_outcome(result: SearchResult, winner: SearchTrial) -> Outcome:
    metric, best = result.metric, winner.best(result.metric)
    assert best is not None  # it is the winner
    among = [trial for trial in result.trials if trial.evaluations]
    if winner.status == "finished":
        among = [trial for trial in among if trial.status == "finished"]
    num_equal = sum(trial.best(metric) == best for trial in among) - 1
    who = winner.name + (f" and {count(num_equal, 'other')}" if num_equal else "")
    what = "trained to the end" if winner.status == "finished" else "evaluated"
    sentence = (
        f"{who} reached {metric_label(metric)} {format_metric(best, metric)}, the highest of "
        f"{count(len(among), 'trial')} that {'was' if len(among) == 1 else 'were'} {what}."
    )
    advice = (
        "The highest of many numbers is partly luck: train it and the default with seeds of their own before "
        "believing that it is better."
    )
    if result.chance is not None and best <= result.chance:
        advice = "That is no more than a guess finds: nothing was learned that could be compared."
    return Outcome(kind="open", sentence=sentence, advice=advice)


def _compared_outcome(
    result: SearchResult, winner: SearchTrial, default: VariantSummary, tuned: VariantSummary
) -> Outcome:
    metric = result.metric
    numbers = (
        f"{metric_label(metric)} {format_metric(tuned.means[metric], metric)} against "
        f"{format_metric(default.means[metric], metric)}, a difference of {format_difference(tuned, metric)} over "
        f"{count(len(tuned.values.keys() & default.values.keys()), 'seed')} that the search did not use"
    )
    interval = f"{CONFIDENCE:.0%} interval, paired by seed"
    if tuned.half_width is None:
        return Outcome(
            kind="open",
            sentence=f"Open: {winner.name} has {numbers}.",
            advice="One seed tells nothing about luck: compare with three or more.",
        )
    if tuned.verdict == "within the noise":
        return Outcome(
            kind="tie",
            sentence=f"A tie: {winner.name} cannot be told from the default. It has {numbers} ({interval}).",
            advice="The difference is within the noise of the seeds: there is no reason to leave the default.",
        )
    if tuned.verdict == "worse":
        return Outcome(
            kind="worse",
            sentence=f"{winner.name} is worse than the default: {numbers} ({interval}).",
            advice="What made it win the search was luck: keep the default.",
        )
    return Outcome(
        kind="better",
        sentence=f"{winner.name} is better than the default: {numbers} ({interval}).",
        advice="The interval tells how much luck is in a training; it says nothing about other places than these.",
    )


def winner_of(result: SearchResult) -> SearchTrial | None:
    """Return the winning trial; None if no trial has an evaluation."""
    return next((trial for trial in result.trials if trial.name == result.best and trial.evaluations), None)


def comparison_of(result: SearchResult) -> tuple[VariantSummary, VariantSummary] | None:
    """Return the default and the winner with seeds of their own; None if either is missing."""
    default = next((one for one in result.comparison if one.difference is None), None)
    tuned = next((one for one in result.comparison if one.difference is not None), None)
    return None if default is None or tuned is None else (default, tuned)


def counts_sentence(result: SearchResult) -> str:
    """Say what became of the trials, and what a guess reaches."""
    found = Counter(trial.status for trial in result.trials)
    words: dict[Status, str] = {
        "finished": "trained to the end",
        "stopped": "stopped early",
        "failed": "failed",
        "running": "not over yet",
    }
    parts = [f"{found[status]} {text}" for status, text in words.items() if found[status]]
    sentence = f"{count(len(result.trials), 'trial')}" + (f": {', '.join(parts)}." if parts else ".")
    if result.chance is not None:
        sentence += f" A guess reaches {format_metric(result.chance, result.metric)}."
    return sentence


def is_recall(metric: str) -> bool:
    """Tell whether a metric is a fraction that people read in per cent."""
    return metric.startswith("recall_at_")


def metric_label(metric: str) -> str:
    """Return a metric's printed name."""
    return RECALLS.get(metric, metric)


def format_metric(value: float, metric: str, *, sign: Literal["", "+"] = "") -> str:
    """Write a metric's value, or with a sign a difference of two, for people."""
    return f"{100 * value:{sign}.2f} %" if is_recall(metric) else f"{value:{sign}.4g}"


def format_difference(summary: VariantSummary, metric: str) -> str:
    """Write a difference with half of its interval, recalls in percentage points."""
    assert summary.difference is not None
    scale, unit, form = (100, " percentage points", ".2f") if is_recall(metric) else (1, "", ".4g")
    spread = "" if summary.half_width is None else f" ± {scale * summary.half_width:{form}}"
    return f"{scale * summary.difference:+{form}}{spread}{unit}"


def count(number: int, noun: str) -> str:
    """Write a number of things."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
