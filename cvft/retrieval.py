"""Exact retrieval: at which place of the ranking the true reference stands, for every query, in bounded memory.

Ties count against the query: `match_rank` is the number of other references that are at least as similar as the true
one, so that a collapsed model scores 0 (the field's code counts only closer references and gives it 100 %).

Exactness: similarities come from a float32 product in blocks. Its rounding depends on where an entry stands in a
block, so two equal descriptors need not tie to the last bit. Therefore every entry that is nearer to the true
similarity than float32's error is computed again in float64. The ranks are those of a float64 ranking in which
differences below float64's own error are ties.

Memory beyond the inputs: tensors of at most 8 * (block + 512) * D + 16 * block^2 bytes (67 MB for block=1024, D=4096),
64 * block^2 more with a `HitDistance`, and 12 * N * T bytes for the list of the best. Measured for 8,884 x 8,884 x
4,096 on one CPU thread (tests/bench/bench_recall.py): 5.5 s, the process grows by 38 MB; a dense float32 product takes
4.4 s and 411 MB and has a wrong rank. A collapsed model takes three times as long.

Shape letters: N queries, M references, D descriptor values, T best references, Q and R rows of a block of queries and
references.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from cvft.errors import TrainingError
from cvft.precision import full_precision

OnePercent = Literal["cvft", "floor"]
_CHUNK = 256  # rows that are held in float64 at a time
_NUM_PAIRS = 64  # single pairs at a time: in float64 they still fit a core's cache
_NUM_RUNS = 16  # of a block's columns, among which the best are looked for first


def one_percent_k(num_references: int, convention: OnePercent = "cvft") -> int:
    """Return the k of R@1 %, see `RetrievalResult.one_percent`."""
    return int(num_references * 0.01) + 1 if convention == "cvft" else max(num_references // 100, 1)


@dataclass(frozen=True, kw_only=True)
class HitDistance:
    """The protocol that accepts any reference near the query (CVACT_test: 5 m), besides its own.

    Attributes:
        query_location_m: float64 [N, 3] in metres, see `Batch`; NaN where unknown, then only the query's own reference
            is a hit.
        reference_location_m: float64 [M, 3].
        distance_m: A reference nearer than this is a hit.
    """

    query_location_m: Tensor
    reference_location_m: Tensor
    distance_m: float


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Ranks of the true references and the best references of every query, on the CPU.

    Attributes:
        match_rank: int64 [N], 0 is first; ties count against the query. With a `HitDistance`: the rank of the best hit
            among the references that are no hits.
        match_score: float32 [N], similarity of the true reference (or of the best hit).
        target: int64 [N], the true reference of every query, counted as in `top_indices`.
        top_indices: int64 [N, T], the most similar references, best first; the order of equal ones is arbitrary.
        top_scores: float32 [N, T], their similarities.
        num_references: M.
        one_percent: Meaning of R@1 %. `cvft`: k = int(M * 0.01) + 1, as in the paper's code (89 of 8,884). `floor`:
            k = M // 100, at least 1, as elsewhere (88).
    """

    match_rank: Tensor
    match_score: Tensor
    target: Tensor
    top_indices: Tensor
    top_scores: Tensor
    num_references: int
    one_percent: OnePercent = "cvft"

    @property
    def one_percent_k(self) -> int:
        """The k of R@1 % under this result's convention."""
        return one_percent_k(self.num_references, self.one_percent)

    def recall_at(self, k: int) -> float:
        """Return the fraction of queries whose true reference is among the first `k`."""
        return (self.match_rank < k).double().mean().item()

    def chance_at(self, k: int) -> float:
        """Return the recall at `k` of a random order."""
        return min(k / self.num_references, 1.0)

    def recalls(self, suffix: str = "") -> dict[str, float]:
        """Return the recalls as fractions, each name with the suffix at its end."""
        return {
            f"recall_at_1{suffix}": self.recall_at(1),
            f"recall_at_5{suffix}": self.recall_at(5),
            f"recall_at_10{suffix}": self.recall_at(10),
            f"recall_at_1_percent{suffix}": self.recall_at(self.one_percent_k),
        }

    def of_queries(self, is_kept: Tensor) -> RetrievalResult:
        """Return the result of some of the queries, bool [N], among all references."""
        names = ("match_rank", "match_score", "target", "top_indices", "top_scores")
        return replace(self, **{name: getattr(self, name)[is_kept] for name in names})

    def metrics(self) -> dict[str, float]:
        """Return the recalls as fractions, beside the chance of R@1 and the median of `match_rank` (0 is best)."""
        return {
            **self.recalls(),
            "chance": self.chance_at(1),
            "num_queries": len(self.match_rank),
            "num_references": self.num_references,
            "median_rank": self.match_rank.double().quantile(0.5).item(),
        }


def rank_matches(
    query: Tensor,
    reference: Tensor,
    *,
    target: Tensor | None = None,
    hits: HitDistance | None = None,
    num_top: int = 10,
    block: int = 1024,
    one_percent: OnePercent = "cvft",
) -> RetrievalResult:
    """Rank every query's true reference among all references.

    Args:
        query: float32 [N, D], L2-normalised.
        reference: float32 [M, D], L2-normalised, on the same device.
        target: int64 [N], row of each query's true reference; without it row i belongs to row i.
        hits: Count any reference within a distance as true as well.
        num_top: T, best references to list per query.
        block: Rows of a block; bounds the memory.
        one_percent: Convention of R@1 %.

    Raises:
        TrainingError: A descriptor holds NaN or infinity, or there is none.
        ValueError: A target is no row of `reference`.
    """
    query, reference = query.float(), reference.float()
    require_finite("query", query)
    require_finite("reference", reference)
    target = (torch.arange(len(query)) if target is None else target).to(query.device)
    smallest, largest = (int(end) for end in target.aminmax())
    if smallest < 0 or largest >= len(reference):
        raise ValueError(f"target names references {smallest} to {largest}, but there are 0 to {len(reference) - 1}")
    parts = []
    longest = reference.norm(dim=1).max()
    with full_precision(query.device), torch.no_grad():
        for rows in row_slices(len(query), block):
            matches = partial(_matches, rows, target=target[rows], hits=hits)
            parts.append(
                _rank_block(query[rows], reference, matches=matches, longest=longest, num_top=num_top, block=block)
            )
    rank, score, indices, scores = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return RetrievalResult(
        match_rank=rank,
        match_score=score.float(),
        target=target.cpu(),
        top_indices=indices,
        top_scores=scores,
        num_references=len(reference),
        one_percent=one_percent,
    )


def _rank_block(
    queries: Tensor,
    reference: Tensor,
    *,
    matches: Callable[[slice], tuple[Tensor, Tensor]],
    longest: Tensor,
    num_top: int,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return match rank [Q], exact score [Q], top indices [Q, T] and top scores [Q, T] of a block of queries."""
    parts = row_slices(len(reference), block)
    score = _best_match(queries, reference, matches=matches, parts=parts)
    # `doubt` is six standard deviations of the rounding error of one running float32 sum of D terms; blocked products
    # stay below (on a CPU at D=4096: a twentieth of it). A float64 sum is off by less than D roundings.
    size = queries.norm(dim=1) * longest
    doubt = size * (2 * queries.shape[1] ** 0.5 * 2.0**-24)
    floor = score - size.double() * (queries.shape[1] * 2.0**-52)
    low, high = ((score.float() + sign * doubt)[:, None] for sign in (-1, 1))
    rank = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    top = (queries.new_empty(len(queries), 0), rank.new_empty(len(queries), 0))
    for part in parts:
        similarity = queries @ reference[part].T
        top = _merge_top(top, similarity, first=part.start, num_top=num_top)
        similarity[matches(part)] = -torch.inf
        is_near = similarity >= low
        rank += is_near.view(torch.uint8).sum(dim=1, dtype=torch.int32)  # the doubtful ones too; three times faster
        is_doubtful = is_near.logical_and_(similarity <= high)
        rank -= _count_less(queries, reference[part], is_doubtful=is_doubtful, floor=floor)
    return rank, score, top[1], top[0]


def _count_less(queries: Tensor, references: Tensor, *, is_doubtful: Tensor, floor: Tensor) -> Tensor:
    """Count for each query [Q] the doubtful references whose float64 similarity is less than `floor` [Q]."""
    if torch.count_nonzero(is_doubtful) <= len(queries):
        rows, columns = is_doubtful.nonzero(as_tuple=True)
        is_less = _exact_similarity(queries, references, rows=rows, columns=columns) < floor[rows]
        return torch.bincount(rows[is_less], minlength=len(queries))
    # So many that a whole product costs less than one by one: the model has all but collapsed.
    exact_references = references.double().T
    counts = []
    for part in row_slices(len(queries), _CHUNK):
        exact = queries[part].double() @ exact_references
        counts.append(((exact < floor[part, None]) & is_doubtful[part]).sum(dim=1))
    return torch.cat(counts)


def _exact_similarity(queries: Tensor, references: Tensor, *, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the float64 similarities [P] of P single pairs."""
    products = [
        queries[rows[pairs]].double().mul_(references[columns[pairs]]).sum(dim=1)
        for pairs in row_slices(len(rows), _NUM_PAIRS)
    ]
    return torch.cat([queries.new_empty(0, dtype=torch.float64), *products])


def _merge_top(top: tuple[Tensor, Tensor], similarity: Tensor, *, first: int, num_top: int) -> tuple[Tensor, Tensor]:
    """Merge the best scores and indices [Q, T] so far with a block's similarities [Q, R], which start at `first`."""
    scores, columns = _top(similarity, min(num_top, similarity.shape[1]))
    scores, indices = torch.cat([top[0], scores], dim=1), torch.cat([top[1], columns + first], dim=1)
    scores, order = scores.topk(min(num_top, scores.shape[1]), dim=1)
    return scores, indices.gather(1, order)


def _top(similarity: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
    """Do what `similarity.topk` does, in one fast pass: no more columns can matter than those of the best maxima."""
    num_rows, num_columns = similarity.shape
    width = num_columns // _NUM_RUNS
    if num_columns % _NUM_RUNS or width <= num_top:
        scores, columns = similarity.topk(num_top, dim=1)
        return scores, columns
    best = similarity.view(num_rows, _NUM_RUNS, width).amax(dim=1).topk(num_top, dim=1).indices
    runs = torch.arange(0, num_columns, width, device=similarity.device)
    candidates = (best[:, :, None] + runs).flatten(1)
    scores, places = similarity.gather(1, candidates).topk(num_top, dim=1)
    return scores, candidates.gather(1, places)


def _best_match(
    queries: Tensor, reference: Tensor, *, matches: Callable[[slice], tuple[Tensor, Tensor]], parts: list[slice]
) -> Tensor:
    """Return the float64 similarity [Q] of each query's true reference, or of the best of several."""
    best = torch.full((len(queries),), -torch.inf, dtype=torch.float64, device=queries.device)
    for part in parts:
        rows, columns = matches(part)
        exact = _exact_similarity(queries, reference[part], rows=rows, columns=columns)
        best.scatter_reduce_(0, rows, exact, "amax")
    return best


def _matches(rows: slice, part: slice, *, target: Tensor, hits: HitDistance | None) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the true references within `part`, for queries of `rows` with their own `target`s."""
    if hits is None:
        (inside,) = ((target >= part.start) & (target < part.stop)).nonzero(as_tuple=True)
        return inside, target[inside] - part.start
    is_match = target[:, None] == torch.arange(part.start, part.stop, device=target.device)
    query_m = hits.query_location_m[rows].to(target.device)
    reference_m = hits.reference_location_m[part].to(target.device)
    squared = (query_m[:, None] - reference_m[None, :]).square().sum(dim=-1)
    is_match |= squared < hits.distance_m**2  # false for NaN
    found, columns = is_match.nonzero(as_tuple=True)
    return found, columns


def row_slices(length: int, step: int) -> list[slice]:
    """Cut `length` rows into blocks of `step` rows; the last one may be shorter."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def require_finite(role: str, descriptors: Tensor) -> None:
    """Refuse descriptors of weights that have diverged, and an empty split.

    Args:
        role: What to call them in the message.
        descriptors: float32 [N, D].

    Raises:
        TrainingError: A value is NaN or infinite, or there is no row.
    """
    if len(descriptors) == 0:
        raise TrainingError(f"there is no {role} descriptor to rank; the split is empty")
    if torch.linalg.vector_norm(descriptors, dim=1).isfinite().all():
        return  # nothing that is not finite is in a finite sum of squares; one fast pass, and nearly always the answer
    is_finite = torch.cat([descriptors[rows].isfinite().all(dim=1) for rows in row_slices(len(descriptors), _CHUNK)])
    if not is_finite.all():
        bad = (~is_finite).nonzero()[:, 0].tolist()
        raise TrainingError(
            f"{len(bad)} of {len(descriptors)} {role} descriptors are not finite, first in rows {bad[:5]};"
            " the weights have diverged: use an earlier checkpoint or a lower learning rate"
        )
