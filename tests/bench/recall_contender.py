"""The contenders of bench_recall.py, run in the peers' environment on one thread.

    python recall_contender.py compare --rounds 3   # one line of JSON: times and wrong ranks
    python recall_contender.py memory NAME          # one line of JSON: peak memory of one ranking
    python recall_contender.py large                # one line of JSON: ours on 92,802 references

`--pairs` and `--size` make smaller descriptors. Shape letters: N pairs, D descriptor values.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from cvft.retrieval import rank_matches

LISTED = 100
NUM_CENTRES = 400
LARGE, LARGE_QUERIES = 92_802, 4_096
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def make_descriptors(num: int, size: int) -> tuple[Floats, Floats, Ints]:
    """Return queries and references [N, D], and the row [N] that each reference is a copy of."""
    random = np.random.default_rng(0)
    reference = random.standard_normal((num, size), dtype=np.float32)
    of_cluster = random.permutation(num)[: num // 2]
    centres = random.standard_normal((NUM_CENTRES, size), dtype=np.float32)
    reference[of_cluster] = centres[random.integers(NUM_CENTRES, size=len(of_cluster))] + 0.05 * reference[of_cluster]
    source = np.arange(num)
    copies = random.permutation(num)[: num // 6]
    source[copies] = random.choice(np.setdiff1d(source, copies), len(copies))
    reference = _unit(reference)[source]
    # From nearly the reference itself to nearly nothing of it.
    noise = random.uniform(0.1, 12.0, (num, 1)).astype(np.float32) * size**-0.5
    query = _unit(reference + noise * random.standard_normal((num, size), dtype=np.float32))
    return query, reference, source


def _unit(rows: Floats) -> Floats:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def rank_ours(query: Floats, reference: Floats) -> Ints:
    return rank_matches(torch.from_numpy(query), torch.from_numpy(reference)).match_rank.numpy()


def rank_numpy(query: Floats, reference: Floats) -> Ints:
    similarity = query @ reference.T
    return (similarity >= similarity.diagonal()[:, None]).sum(axis=1) - 1


def rank_faiss(query: Floats, reference: Floats) -> Ints:
    index = faiss.IndexFlatIP(reference.shape[1])
    index.add(reference)
    return _place(index.search(query, LISTED)[1])


def rank_sklearn(query: Floats, reference: Floats) -> Ints:
    neighbours = NearestNeighbors(n_neighbors=LISTED, algorithm="brute").fit(reference)
    return _place(neighbours.kneighbors(query, return_distance=False))


def _place(best: Ints) -> Ints:
    """Return the place of reference i among the best [N, 100] of query i; 100 where it is not among them."""
    is_match = best == np.arange(len(best))[:, None]
    return np.where(is_match.any(axis=1), is_match.argmax(axis=1), LISTED)


CONTENDERS: dict[str, Callable[[Floats, Floats], Ints]] = {
    "ours": rank_ours,
    "numpy": rank_numpy,
    "faiss": rank_faiss,
    "scikit-learn": rank_sklearn,
}
WHOLE = ("ours", "numpy")  # the others list the best 100


def float64_ranks(query: Floats, reference: Floats, source: Ints) -> Ints:
    """Rank by float64 similarities; those of equal references are the same number, each being computed once."""
    unique, inverse = np.unique(source, return_inverse=True)
    exact = reference[unique].astype(np.float64).T
    ranks = []
    for start in range(0, len(query), 256):
        similarity = (query[start : start + 256].astype(np.float64) @ exact)[:, inverse]
        own = similarity[np.arange(len(similarity)), np.arange(start, start + len(similarity))]
        ranks.append((similarity >= own[:, None]).sum(axis=1) - 1)
    return np.concatenate(ranks)


def compare(num_rounds: int, num: int, size: int) -> dict[str, object]:
    query, reference, source = make_descriptors(num, size)
    expected = float64_ranks(query, reference, source)
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    wrong: dict[str, int] = {}
    for rank in CONTENDERS.values():
        rank(query[:256], reference[:256])  # loads what has to be loaded
    for _ in range(num_rounds):
        for name, rank in CONTENDERS.items():
            start = time.process_time()
            found = rank(query, reference)
            times[name].append(time.process_time() - start)
            best = expected if name in WHOLE else np.minimum(expected, LISTED)
            wrong[name] = int((found != best).sum())
    tied = int((source != np.arange(num)).sum())
    recall = float((expected < 1).mean())
    return {
        "cpu_s": times,
        "wrong": wrong,
        "copies": tied,
        "recall_at_1": recall,
        "listed": int((expected < 100).sum()),
    }


def measure_memory(name: str, num: int, size: int) -> dict[str, float]:
    query, reference, _ = make_descriptors(num, size)
    CONTENDERS[name](query[:256].copy(), reference[:256].copy())
    return {"peak_mb": _peak_growth_mb(lambda: CONTENDERS[name](query, reference))}


def measure_large(num: int, num_queries: int, size: int) -> dict[str, float]:
    """Both views are there in full; the ranking's memory depends on the number of queries by its results alone."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.empty(num, size)
    for rows in reference.split(1024):
        rows.copy_(torch.nn.functional.normalize(torch.randn(len(rows), size, generator=generator), dim=1))
    query = reference.clone()
    start = time.process_time()
    growth = _peak_growth_mb(lambda: rank_matches(query[:num_queries], reference))
    seconds = time.process_time() - start
    return {
        "references": num,
        "queries": num_queries,
        "descriptors_gb": 2 * reference.nbytes / 1e9,
        "extra_mb": growth,
        "in_all_gb": (_status_kb("VmHWM") * 1024) / 1e9,
        "cpu_s": seconds,
        "all_queries_cpu_s": seconds * num / num_queries,
    }


def _peak_growth_mb(work: Callable[[], object]) -> float:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status_kb("VmRSS")
    work()
    return (_status_kb("VmHWM") - before) * 1024 / 1e6


def _status_kb(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found.group(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["compare", "memory", "large"])
    parser.add_argument("name", nargs="?", choices=[*CONTENDERS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=8_884)
    parser.add_argument("--size", type=int, default=4_096)
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    if options.what == "compare":
        result = compare(options.rounds, options.pairs, options.size)
    elif options.what == "memory":
        result = measure_memory(options.name, options.pairs, options.size)
    else:
        result = measure_large(LARGE, LARGE_QUERIES, options.size)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
