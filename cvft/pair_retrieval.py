"""Retrieval among pairs: each ground image's own aerial image is the true one, also where several pairs share it.

Shape letters: N pairs, M locations, D descriptor values, T best references.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cvft.retrieval import HitDistance, RetrievalResult, rank_matches


def rank_pairs(
    ground: Tensor,
    aerial: Tensor,
    *,
    location: Tensor | None = None,
    location_m: Tensor | None = None,
    hit_distance_m: float | None = None,
    num_top: int = 10,
    block: int = 1024,
) -> RetrievalResult:
    """Rank every pair's aerial image for its ground image among the aerial images of all locations.

    Args:
        ground: float32 [N, D], L2-normalised.
        aerial: float32 [N, D], L2-normalised.
        location: int64 [N], equal for pairs of one location (VIGOR), which share their reference: the aerial image of
            the first of them. Without it every pair is a location of its own.
        location_m: float64 [N, 3], position of every pair in metres.
        hit_distance_m: Count any reference nearer than this as true as well; needs `location_m`.
        num_top: T, best references to list per query.
        block: Rows of a block; bounds the memory.

    Returns:
        The result, in which references are named by the row of their pair.

    Raises:
        TrainingError: A descriptor holds NaN or infinity, or there is none.
    """
    first, target = _references(len(aerial), location)
    is_each = len(first) == len(aerial)
    hits = None
    if hit_distance_m is not None and location_m is not None:
        hits = HitDistance(
            query_location_m=location_m, reference_location_m=location_m[first], distance_m=hit_distance_m
        )
    reference = aerial if is_each else aerial[first]
    result = rank_matches(ground, reference, target=target, hits=hits, num_top=num_top, block=block)
    return replace(result, target=first[result.target], top_indices=first[result.top_indices])


def _references(num_pairs: int, location: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the first row [M] of every location, in the order of rows, and for each pair [N] the place among them."""
    rows = torch.arange(num_pairs)
    if location is None:
        return rows, rows
    _, code = torch.unique(location, return_inverse=True)
    first = rows.new_full((int(code.max()) + 1,), num_pairs).scatter_reduce_(0, code, rows, "amin")
    first, order = first.sort()
    return first, order.argsort()[code]
