"""The most similar references of every query: by brute force, in blocks, the same on any number of ranks.

Similarities are float32 products of blocks whose places do not depend on the number of ranks, so that the same
descriptors give the same bits whoever computes a block. Equal similarities are listed by index: similarity and index
are packed into one integer, of which no two are equal.

Cost for N queries and references of D values, over W ranks: each multiplies 2 * N^2 * D / W times and holds, besides
the descriptors, tensors of at most 8 * block * D + 30 * block^2 bytes (65 MB for block=1024, D=4096).

Shape letters: N queries, M references, D descriptor values, K references to find, Q and R rows of a block of queries
and references.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cvft.distributed import current_world, gather
from cvft.precision import full_precision
from cvft.retrieval import require_finite, row_slices

_LOWEST = -(2**63)
_INDEX_BITS = 32
_INDEX_MASK = 2**_INDEX_BITS - 1


def most_similar(query: Tensor, reference: Tensor, *, k: int, device: torch.device, block: int = 1024) -> Tensor:
    """Find the `k` references of the largest inner product with each query, sharing the work among the ranks.

    Args:
        query: float32 [N, D], the same on every rank.
        reference: float32 [M, D], the same on every rank.
        k: K, at most M.
        device: Where this rank multiplies; blocks are copied there.
        block: Rows of a block, the same on every rank.

    Returns:
        int32 [N, K] on the CPU, on every rank: best first, of equal ones the lower index first.

    Raises:
        TrainingError: A descriptor holds NaN or infinity, or there is none.
        ValueError: There are fewer than `k` references.
    """
    require_finite("query", query)
    require_finite("reference", reference)
    if not 1 <= k <= len(reference):
        raise ValueError(f"k: {k} must lie in 1 to {len(reference)}, the number of references")

    def search(rows: slice) -> Tensor:
        return _search(query[rows].to(device), reference, k=k, block=block).to(torch.int32)

    with full_precision(device), torch.no_grad():
        return share_rows(len(query), search, width=k, block=block, device=device)


def share_rows(
    num_rows: int, compute: Callable[[slice], Tensor], *, width: int, device: torch.device, block: int = 1024
) -> Tensor:
    """Let each rank compute some blocks of a table's rows and give all of them the whole table.

    Every row is computed by one rank alone, so that all agree on it, whatever their machines make of its last bit.

    Args:
        num_rows: N, the same on every rank.
        compute: Gives the rows of a slice, int32 [rows, width].
        width: Columns of the table.
        device: Where this rank's tensors are gathered.
        block: Rows of a block; the blocks are the same for any number of ranks.

    Returns:
        int32 [N, width] on the CPU.
    """
    world = current_world()
    parts = row_slices(num_rows, block)
    # As many blocks on every rank, the last ones empty.
    own = torch.full((-(-len(parts) // world.size), block, width), -1, dtype=torch.int32, device=device)
    for place, part in zip(own, parts[world.rank :: world.size], strict=False):
        place[: part.stop - part.start] = compute(part)
    return gather(own).flatten(0, 1)[:num_rows].cpu()


def _search(queries: Tensor, reference: Tensor, *, k: int, block: int) -> Tensor:
    """Return the indices [Q, K] of the best references."""
    best = torch.full((len(queries), 0), _LOWEST, dtype=torch.int64, device=queries.device)
    for part in row_slices(len(reference), block):
        similarity = queries @ reference[part].to(queries.device).T
        keys = torch.cat([best, _keys(similarity, first=part.start)], dim=1)
        best = keys.topk(min(k, keys.shape[1]), dim=1).values
    index: Tensor = _INDEX_MASK - (best & _INDEX_MASK)
    return index


def _keys(similarity: Tensor, *, first: int) -> Tensor:
    """Pack float32 similarities [Q, R] and the indices of their columns into int64 that sort as (similarity, -index).

    The bits of a positive float sort as an integer; those of a negative one do once all but the sign are turned over.
    """
    bits = (similarity + 0.0).view(torch.int32)  # the sum makes zeros of either sign the same
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    index = torch.arange(first, first + similarity.shape[1], device=similarity.device)
    keys: Tensor = (ordered.long() << _INDEX_BITS) | (_INDEX_MASK - index)
    return keys
