"""Retrieval made visible: a query's panorama above the references that the model found most alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from cvft.retrieval import RetrievalResult
from pipeline.report.contents import FloatArray, IntArray, PairImages
from pipeline.report.style import (
    LIGHT_TABLE,
    RIGHT,
    WRONG_AHEAD,
    WRONG_BEHIND,
    add_label,
    add_photo,
    new_figure,
)

NUM_SHOWN = 5
WIDTH_PX = 1200.0
GAP_PX = 10.0
MAX_PANORAMA_HEIGHT_PX = 330.0


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One reference beside a query.

    Attributes:
        index: The reference.
        rank: Its place, 0 is first.
        score: Cosine similarity.
        distance_m: From the query's place to the reference's, if known.
        frame: Colour of its frame.
    """

    index: int
    rank: int
    score: float
    distance_m: float | None
    frame: str

    @property
    def label(self) -> str:
        """What is written on the picture."""
        parts = [f"#{self.rank + 1}", f"{self.score:.3f}"]
        if self.distance_m is not None:
            parts.append(format_distance(self.distance_m))
        return " · ".join(parts)


def format_distance(distance_m: float) -> str:
    """Write a distance as a person would: 41 m, 3.2 km, 120 km."""
    if distance_m < 1000:
        return f"{distance_m:.0f} m"
    return f"{distance_m / 1000:.1f} km" if distance_m < 100_000 else f"{distance_m / 1000:,.0f} km"


def shown_references(query: int, result: RetrievalResult, locations_m: FloatArray | None) -> list[Shown]:
    """List the best references of a query, and its true one behind them when it is not among them.

    The true reference is framed green, wrong ones ahead of it red, wrong ones behind it grey.
    """
    match_rank, target = int(result.match_rank[query]), int(result.target[query])
    shown = []
    for rank, index in enumerate(result.top_indices[query, :NUM_SHOWN].tolist()):
        frame = RIGHT if index == target else WRONG_AHEAD if rank <= match_rank else WRONG_BEHIND
        # A tie counts against the query: the true one may stand further left than its rank says.
        shown.append(
            Shown(
                index=index,
                rank=match_rank if index == target else rank,
                score=float(result.top_scores[query, rank]),
                distance_m=_distance_m(locations_m, query, index),
                frame=frame,
            )
        )
    if all(item.index != target for item in shown):
        score = float(result.match_score[query])
        distance_m = _distance_m(locations_m, query, target)
        shown.append(Shown(index=target, rank=match_rank, score=score, distance_m=distance_m, frame=RIGHT))
    return shown


def _distance_m(locations_m: FloatArray | None, query: int, reference: int) -> float | None:
    if locations_m is None:
        return None
    distance = float(np.linalg.norm(locations_m[query] - locations_m[reference]))
    return distance if np.isfinite(distance) else None


def retrieval_figure(
    query: int, *, result: RetrievalResult, images: PairImages, locations_m: FloatArray | None = None
) -> Figure:
    """Draw a query's panorama above its best references, each with rank, score and distance.

    Args:
        query: Index of the query.
        result: Ranks and best references of all queries.
        images: Gives the ground and aerial image of an index.
        locations_m: Position of every pair in metres, [N, 3], NaN where unknown.
    """
    ground, _ = images(query)
    shown = shown_references(query, result, locations_m)
    inner_px = WIDTH_PX - 2 * GAP_PX
    panorama_height = min(inner_px * ground.shape[0] / ground.shape[1], MAX_PANORAMA_HEIGHT_PX)
    panorama_width = min(panorama_height * ground.shape[1] / ground.shape[0], inner_px)
    columns = NUM_SHOWN + 1
    tile = (inner_px - (columns - 1) * GAP_PX) / columns
    height = panorama_height + tile + 3 * GAP_PX
    figure = new_figure(width_px=WIDTH_PX, height_px=height, background=LIGHT_TABLE)
    panorama_left = (WIDTH_PX - panorama_width) / 2
    axes = add_photo(figure, ground, box_px=(panorama_left, GAP_PX, panorama_width, panorama_height))
    add_label(figure, axes, f"query {query} · the right place came #{int(result.match_rank[query]) + 1}", at_top=True)
    indent = (columns - len(shown)) * (tile + GAP_PX) / 2
    for column, item in enumerate(shown):
        left = GAP_PX + indent + column * (tile + GAP_PX)
        aerial = images(item.index)[1]
        box = (left, panorama_height + 2 * GAP_PX, tile, tile)
        add_label(figure, add_photo(figure, aerial, box_px=box, frame=item.frame), item.label)
    return figure


def best_and_worst(result: RetrievalResult, num_examples: int) -> tuple[IntArray, IntArray]:
    """Choose the queries to show: the surest successes and the greatest failures, none twice.

    Queries are ordered by the rank of their true reference; among equals, by the lead of the first reference over the
    second.

    Returns:
        Indices of the best queries, best first, and of the worst, worst first; at most `num_examples` each.
    """
    scores = result.top_scores.numpy()
    lead = scores[:, 0] - scores[:, 1] if scores.shape[1] > 1 else np.zeros(len(scores))
    order = np.lexsort((-lead, result.match_rank.numpy()))
    num_examples = max(num_examples, 0)  # slices count negative numbers from the end
    num_best = min(num_examples, (len(order) + 1) // 2)
    num_worst = min(num_examples, len(order) - num_best)
    return order[:num_best], order[len(order) - num_worst :][::-1]
