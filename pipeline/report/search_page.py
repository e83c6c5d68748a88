"""Compose the report of a search: one HTML page that needs nothing else, and its pictures as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.report.ablation import ablation_figure
from pipeline.report.page import Picture, Pictures
from pipeline.report.render import render
from pipeline.report.search_axes import format_value, short_name
from pipeline.report.search_figures import curves_figure, importance_figure, lineage_figure
from pipeline.report.search_importance import MIN_TRIALS, NUM_SHUFFLES, Importances, importances_of
from pipeline.report.search_lines import lines_of
from pipeline.report.search_parallel import parallel_figure, shades
from pipeline.report.search_svg import Drawing, drawing_of
from pipeline.report.search_words import (
    comparison_of,
    count,
    counts_sentence,
    format_difference,
    format_metric,
    metric_label,
    outcome_of,
    winner_of,
)
from pipeline.report.style import DARK, LIGHT
from pipeline.search import Parameter, SearchResult, SearchTrial


@dataclass(frozen=True, kw_only=True)
class SearchFiles:
    """Where the report was written.

    Attributes:
        html: The page.
        pngs: Its pictures.
    """

    html: Path
    pngs: list[Path]


def write_search_report(result: SearchResult, out: Path) -> SearchFiles:
    """Write `search.html` and `figures/*.png` into `out`.

    Args:
        result: What the search found; a search without any evaluation makes a page too.
        out: Made if missing; files of an earlier report are overwritten.
    """
    pictures = Pictures(out / "figures")
    importances = importances_of(result)
    names = [parameter.name for parameter in result.parameters]
    context = {
        "result": result,
        "outcome": outcome_of(result),
        "counts": counts_sentence(result),
        "metric": metric_label(result.metric),
        "numbers": _numbers(result),
        "shades": list(zip(shades(LIGHT), shades(DARK), strict=True)),
        "drawing": _parallel(pictures, result),
        "importances": importances,
        "importance": _importance(pictures, importances, names),
        "num_shuffles": NUM_SHUFFLES,
        "min_trials": MIN_TRIALS,
        "curves": _curves(pictures, result),
        "comparison": _comparison(pictures, result),
        "seeds": _seed_rows(result),
        "lineage": _lineage(pictures, result),
        "parameters": [_parameter_row(parameter, result) for parameter in result.parameters],
        "columns": [(name, short_name(name, names)) for name in names],
        "trials": _trial_rows(result),
        "failures": [trial for trial in result.trials if trial.status == "failed"],
    }
    html = out / "search.html"
    html.write_text(render("search.html.j2", context), encoding="utf-8", errors="backslashreplace")
    return SearchFiles(html=html, pngs=pictures.paths)


def _numbers(result: SearchResult) -> list[tuple[str, str]]:
    """Return the large numbers at the top with their words."""
    winner, compared = winner_of(result), comparison_of(result)
    rows: list[tuple[str, str]] = []
    if compared is not None:
        default, tuned = compared
        label = metric_label(result.metric)
        rows.append((format_metric(tuned.means[result.metric], result.metric), f"{label} of the winner, new seeds"))
        rows.append((format_metric(default.means[result.metric], result.metric), f"{label} of the default, same seeds"))
        rows.append(
            (format_difference(tuned, result.metric).removesuffix(" percentage points"), "points of difference")
        )
    elif winner is not None:
        best = winner.best(result.metric)
        assert best is not None
        rows.append((format_metric(best, result.metric), f"{metric_label(result.metric)} of the best trial"))
    rows.append((f"{len(result.trials):,}", "trial" if len(result.trials) == 1 else "trials"))
    return rows


def _parallel(pictures: Pictures, result: SearchResult) -> Drawing | None:
    lines = lines_of(result)
    if not lines.lines or not result.parameters:
        return None
    pictures.keep("parallel_coordinates", parallel_figure(result))
    return drawing_of(lines)


def _importance(pictures: Pictures, found: Importances, names: Sequence[str]) -> Picture | None:
    if not found.found:
        return None
    figures = [importance_figure(found, names=names, theme=theme) for theme in (LIGHT, DARK)]
    shares = ", ".join(f"{importance.name} {importance.share:.0%}" for importance in found.found)
    return pictures.add("importance", *figures, alt=f"Share of the variance that each parameter explains: {shares}")


def _curves(pictures: Pictures, result: SearchResult) -> Picture | None:
    number = sum(bool(trial.evaluations) for trial in result.trials)
    if number == 0:
        return None
    figures = [curves_figure(result, theme=theme) for theme in (LIGHT, DARK)]
    return pictures.add("learning_curves", *figures, alt=f"{metric_label(result.metric)} of {number} trials by epoch")


def _comparison(pictures: Pictures, result: SearchResult) -> Picture | None:
    compared = comparison_of(result)
    if compared is None:
        return None
    figures = [
        ablation_figure(
            compared,
            metric=result.metric,
            chance=result.chance,
            subtitle="Each dot is a training with a seed that the search did not use",
            theme=theme,
        )
        for theme in (LIGHT, DARK)
    ]
    return pictures.add("comparison", *figures, alt=outcome_of(result).sentence)


def _seed_rows(result: SearchResult) -> list[tuple[int, str, str, str]]:
    """Return each common seed with the default's and the winner's metric and their difference."""
    compared = comparison_of(result)
    if compared is None:
        return []
    default, tuned = compared
    return [
        (
            seed,
            format_metric(default.values[seed], result.metric),
            format_metric(tuned.values[seed], result.metric),
            format_metric(tuned.values[seed] - default.values[seed], result.metric, sign="+").removesuffix(" %"),
        )
        for seed in sorted(default.values.keys() & tuned.values.keys())
    ]


def _lineage(pictures: Pictures, result: SearchResult) -> Picture | None:
    taken = [trial for trial in result.trials if trial.donor]
    if not taken:
        return None
    figures = [lineage_figure(result, theme=theme) for theme in (LIGHT, DARK)]
    pairs = ", ".join(f"{trial.name} from {trial.donor}" for trial in taken)
    return pictures.add("lineage", *figures, alt=f"Who took whose weights last: {pairs}")


def _parameter_row(parameter: Parameter, result: SearchResult) -> dict[str, str]:
    winner = winner_of(result)
    if parameter.kind == "choice":
        space = ", ".join(format_value(value) for value in parameter.choices)
    else:
        scale = ", logarithmic" if parameter.is_log else ""
        space = f"{format_value(parameter.low)} to {format_value(parameter.high)}{scale}"
    chosen = ""
    if winner is not None:
        has_it = parameter.name in winner.values
        chosen = format_value(winner.values[parameter.name]) if has_it else "not set"
    return {"name": parameter.name, "space": space, "default": format_value(parameter.default), "winner": chosen}


def _trial_rows(result: SearchResult) -> list[dict[str, Any]]:
    """Return the table of trials, the best first and those without an evaluation last."""
    rows = [_trial_row(trial, result) for trial in result.trials]
    return sorted(rows, key=lambda row: (row["best_number"] is None, -(row["best_number"] or 0.0)))


def _trial_row(trial: SearchTrial, result: SearchResult) -> dict[str, Any]:
    best = trial.best(result.metric)
    values: Mapping[str, Any] = trial.values
    cells = [format_value(values[one.name]) if one.name in values else "" for one in result.parameters]
    at = next((found["epoch"] for found in trial.evaluations if found[result.metric] == best), None)
    return {
        "name": trial.name,
        "status": trial.status,
        "is_best": trial.name == result.best,
        "cells": cells,
        "best": "" if best is None else format_metric(best, result.metric),
        "best_number": best,
        "best_epoch": "" if at is None else f"{at:g}",
        "epochs": f"{trial.evaluations[-1]['epoch']:g}" if trial.evaluations else "0",
        "seconds": trial.seconds,
        "donor": trial.donor,
        "words": _words(trial, result),
    }


def _words(trial: SearchTrial, result: SearchResult) -> str:
    """Describe a trial in a line, for those who point at it."""
    best = trial.best(result.metric)
    reached = "" if best is None else f", {metric_label(result.metric)} {format_metric(best, result.metric)}"
    values = ", ".join(f"{name}={format_value(value)}" for name, value in trial.values.items())
    return f"{trial.name}: {trial.status} after {count(len(trial.evaluations), 'evaluation')}{reached}; {values}"
