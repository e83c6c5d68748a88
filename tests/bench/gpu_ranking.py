"""Exact ranks on a GPU, for bench_gpu.py: seconds, memory, and what is wrong of them.

Shape letters: N pairs, D descriptor values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from cvft.retrieval import rank_matches


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory_gb(device: torch.device, work: Callable[[], object]) -> float:
    if device.type != "cuda":
        work()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() / 1e9


def make_descriptors(num: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and references [N, D], a sixth of them copies of others, and the row [N] each is a copy of."""
    generator = torch.Generator(device).manual_seed(0)
    reference = functional.normalize(torch.randn(num, size, device=device, generator=generator), dim=1)
    source = torch.arange(num, device=device)
    copies = torch.randperm(num, device=device, generator=generator)[: num // 6]
    originals = source[~torch.isin(source, copies)]
    source[copies] = originals[torch.randint(len(originals), (len(copies),), device=device, generator=generator)]
    reference = reference[source]
    noise = torch.randn(num, size, device=device, generator=generator)
    weight = torch.rand(num, 1, device=device, generator=generator) * 12 * size**-0.5
    return functional.normalize(noise.mul_(weight).add_(reference), dim=1), reference, source


def float64_ranks(query: Tensor, reference: Tensor, source: Tensor) -> Tensor:
    unique, inverse = source.unique(return_inverse=True)
    exact = reference[unique].double().T
    ranks = []
    for rows, own in zip(query.split(512), inverse.split(512), strict=True):
        unique_similarity = rows.double() @ exact
        similarity = unique_similarity[:, inverse]
        ranks.append((similarity >= unique_similarity.gather(1, own[:, None])).sum(dim=1) - 1)
    return torch.cat(ranks).cpu()


def measure_ranking(rankings: Iterable[tuple[int, int]], size: int, device: torch.device) -> Iterator[dict]:
    """Exact ranks of all queries; checked against float64 where that takes no minutes."""
    for num, block in rankings:
        query, reference, source = make_descriptors(num, size, device)
        rank_matches(query[:512], reference[:512], block=block)
        wait(device)
        held_gb = peak_memory_gb(device, lambda: None)
        start = time.perf_counter()
        memory_gb, ranks = ranking_memory_gb(device, query, reference, block)
        row = {"references": num, "block": block, "seconds": round(time.perf_counter() - start, 3)}
        row["extra_gb"] = round(memory_gb - held_gb, 3)
        if num < 10_000:
            row["wrong"] = int((ranks != float64_ranks(query, reference, source)).sum())
        yield row


def ranking_memory_gb(device: torch.device, query: Tensor, reference: Tensor, block: int) -> tuple[float, Tensor]:
    results: list[Tensor] = []
    memory_gb = peak_memory_gb(device, lambda: results.append(rank_matches(query, reference, block=block).match_rank))
    return memory_gb, results[0]
