"""Compose the report: draw the pictures, write them as PNG files and as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from cvft.retrieval import RetrievalResult
from pipeline.report.charts import RECALLS, location_figure, recall_figure, training_figure
from pipeline.report.contents import (
    DataSummary,
    FloatArray,
    IntArray,
    PairImages,
    ReportFiles,
    TransportExample,
)
from pipeline.report.distances import PROTOCOL_DISTANCES_M, answer_distances, distance_figure
from pipeline.report.flow import MIN_SHARE, effective_sources, strongest_flows, transport_figure
from pipeline.report.gallery import best_and_worst, format_distance, retrieval_figure
from pipeline.report.render import render
from pipeline.report.style import DARK, LIGHT, data_uri, rasterise

ONE_PERCENT_RULES = {"cvft": "int(N / 100) + 1, as in the paper's code", "floor": "N // 100, at least 1"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture on the page: encoded for light and dark, with words for those who cannot see it."""

    light: str
    dark: str | None
    alt: str
    width_px: int
    height_px: int
    caption: str = ""


class Pictures:
    """Writes each figure as a PNG file and gives it back encoded for the page."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.paths: list[Path] = []

    def add(self, name: str, light: Figure, dark: Figure | None = None, *, alt: str, caption: str = "") -> Picture:
        """Keep a figure. Photographs look the same in light and dark and have no `dark` figure."""
        image = self.keep(name, light)
        is_photo = dark is None
        return Picture(
            light=data_uri(image, is_photo=is_photo),
            dark=None if dark is None else data_uri(rasterise(dark), is_photo=False),
            alt=alt,
            width_px=image.width,
            height_px=image.height,
            caption=caption,
        )

    def keep(self, name: str, figure: Figure) -> Image.Image:
        """Write a figure as a PNG file alone, and return its pixels."""
        image = rasterise(figure)
        path = self.directory / f"{name}.png"
        image.save(path, compress_level=3)  # half the time of the default for a few percent more bytes
        self.paths.append(path)
        return image


def build_report(
    out_dir: Path,
    *,
    title: str,
    data: DataSummary,
    history: Sequence[Mapping[str, Any]],
    result: RetrievalResult,
    images: PairImages,
    deleaked: RetrievalResult | None = None,
    locations_m: FloatArray | None = None,
    transports: Sequence[TransportExample] = (),
    facts: Mapping[str, object] | None = None,
    num_examples: int = 4,
) -> ReportFiles:
    """Write `report.html` and `figures/*.png` into `out_dir`.

    Args:
        out_dir: Made if missing; files of an earlier report are overwritten.
        title: Heading of the page.
        data: The dataset.
        history: One mapping per epoch, see `training_figure`; may be empty.
        result: How the queries did; references are named by the row of their pair.
        images: Gives the ground and aerial image of an index.
        deleaked: How those queries did that are in no training pair; none if that is not known.
        locations_m: Position of every pair in metres, [N, 3], NaN where unknown.
        transports: Plans to show; empty for a head without transport.
        facts: Further lines for "How this was made" (run, commit, checkpoint, model version).
        num_examples: How many of the best and of the worst queries to show.
    """
    pictures = Pictures(out_dir / "figures")
    context = {
        "title": title,
        "data": data,
        "facts": facts or {},
        "rows": recall_rows(result, deleaked),
        "rule": ONE_PERCENT_RULES[result.one_percent],
        "num_leaked": None if deleaked is None else len(result.match_rank) - len(deleaked.match_rank),
        "summary": _summary(result, locations_m),
        "location_map": _location_map(pictures, data),
        "training": _training(pictures, history),
        "recall": _recall(pictures, result),
        "distance": _distance(pictures, result, locations_m),
        "examples": _examples(
            pictures, result=result, images=images, locations_m=locations_m, num_examples=num_examples
        ),
        "transports": [
            _transport(pictures, place, example, images) for place, example in enumerate(transports, start=1)
        ],
    }
    html = out_dir / "report.html"
    html.write_text(render("report.html.j2", context), encoding="utf-8")
    return ReportFiles(html=html, pngs=pictures.paths)


def recall_rows(result: RetrievalResult, deleaked: RetrievalResult | None = None) -> list[dict[str, Any]]:
    """Tabulate recall@1, 5, 10 and 1 % beside guessing: name, k, recalls and chance as fractions, and their ratio."""
    rows = []
    for name, k in zip(RECALLS.values(), (1, 5, 10, result.one_percent_k), strict=True):
        recall, chance = result.recall_at(k), result.chance_at(k)
        row = {"name": name, "k": k, "recall": recall, "chance": chance, "ratio": recall / chance}
        rows.append({**row, "deleaked": deleaked.recall_at(k) if deleaked else None})
    return rows


def _summary(result: RetrievalResult, locations_m: FloatArray | None) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "num_queries": len(result.match_rank),
        "num_references": result.num_references,
        "median_place": float(np.median(result.match_rank.numpy())) + 1,
        "median_error": None,
    }
    if locations_m is not None:
        errors = np.linalg.norm(locations_m - locations_m[result.top_indices[:, 0].numpy()], axis=1)
        if np.isfinite(errors).any():
            summary["median_error"] = format_distance(float(np.nanmedian(errors)))
    return summary


def _location_map(pictures: Pictures, data: DataSummary) -> Picture | None:
    known = {split: rows for split, rows in data.locations_deg.items() if np.isfinite(rows).all(axis=1).any()}
    if not known:
        return None
    figures = [location_figure(known, theme=theme) for theme in (LIGHT, DARK)]
    return pictures.add("locations", *figures, alt=f"Map of the places of the splits {', '.join(known)}")


def _training(pictures: Pictures, history: Sequence[Mapping[str, Any]]) -> Picture | None:
    if not history:
        return None
    figures = [training_figure(history, theme=theme) for theme in (LIGHT, DARK)]
    return pictures.add("training", *figures, alt=f"Loss and recalls over {len(history)} epochs")


def _recall(pictures: Pictures, result: RetrievalResult) -> Picture:
    figures = [
        recall_figure(result.match_rank.numpy(), num_references=result.num_references, theme=theme)
        for theme in (LIGHT, DARK)
    ]
    return pictures.add("recall_at_k", *figures, alt="Recall at k against guessing")


def _distance(pictures: Pictures, result: RetrievalResult, locations_m: FloatArray | None) -> dict[str, Any] | None:
    """Return the picture and the numbers of the confusion by distance; None where no position is known."""
    found = answer_distances(result, locations_m)
    if found is None:
        return None
    figures = [distance_figure(found, theme=theme) for theme in (LIGHT, DARK)]
    within = zip(
        PROTOCOL_DISTANCES_M,
        found.found_within(PROTOCOL_DISTANCES_M).tolist(),
        found.guessed_within(PROTOCOL_DISTANCES_M).tolist(),
        strict=True,
    )
    return {
        "picture": pictures.add("confusion_by_distance", *figures, alt="Distance of the first answers from the place"),
        "within": list(within),
        "num_wrong": found.num_wrong,
        "num_unknown": found.num_wrong - len(found.wrong_m),
    }


def _examples(
    pictures: Pictures,
    *,
    result: RetrievalResult,
    images: PairImages,
    locations_m: FloatArray | None,
    num_examples: int,
) -> list[tuple[str, list[Picture]]]:
    best, worst = best_and_worst(result, num_examples)

    def draw(kind: str, queries: IntArray) -> list[Picture]:
        return [
            pictures.add(
                f"{kind}_{place}",
                retrieval_figure(query, result=result, images=images, locations_m=locations_m),
                alt=f"Query {query} and its best references",
                caption=_place(int(result.match_rank[query]), result.num_references),
            )
            for place, query in enumerate(queries.tolist(), start=1)
        ]

    groups = [("Its surest answers", draw("best", best)), ("Its greatest mistakes", draw("worst", worst))]
    return [(name, group) for name, group in groups if group]


def _place(match_rank: int, num_references: int) -> str:
    if match_rank == 0:
        return f"Found: first of {num_references:,}."
    return f"The right place came #{match_rank + 1:,} of {num_references:,}."


def _transport(pictures: Pictures, place: int, example: TransportExample, images: PairImages) -> Picture:
    ground, aerial = images(example.index)
    sources = effective_sources(example.plan)
    flows = strongest_flows(example.plan, example.target_grid)
    caption = f"A cell is fed by {sources.mean():.1f} of {example.plan.shape[0]} positions on average"
    if flows:
        caption += f"; the strongest single flow brings {flows[0].share:.0%} of its cell."
    else:
        caption += f"; no single flow brings {MIN_SHARE:.0%} of a cell or more, so no line is drawn."
    return pictures.add(
        f"transport_{place}",
        transport_figure(example, ground=ground, aerial=aerial),
        alt=f"Transport plan of query {example.index} drawn over its panorama and its aerial image",
        caption=caption,
    )
