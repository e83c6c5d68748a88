import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cvft.errors import TrainingError
from cvft.retrieval import HitDistance, RetrievalResult, rank_matches


def _random(num: int, size: int, seed: int = 0) -> Tensor:
    return functional.normalize(torch.randn(num, size, generator=torch.Generator().manual_seed(seed)), dim=1)


def _clustered(num: int, size: int, num_centres: int) -> tuple[Tensor, Tensor]:
    """Queries and references around few centres; a third of the references are exact copies of others."""
    generator = torch.Generator().manual_seed(1)
    centres = _random(num_centres, size)[torch.randint(num_centres, (num,), generator=generator)]
    reference = functional.normalize(centres + 1e-3 * torch.randn(num, size, generator=generator), dim=1)
    copied = torch.randint(num, (num // 3,), generator=generator)
    reference[torch.randperm(num, generator=generator)[: num // 3]] = reference[copied]
    query = functional.normalize(reference + 1e-3 * torch.randn(num, size, generator=generator), dim=1)
    return query, reference


def _float64_ranks(query: Tensor, reference: Tensor) -> Tensor:
    """Rank by float64 similarities; equal references have bitwise equal ones, since each is computed once."""
    unique, inverse = np.unique(reference.double().numpy(), axis=0, return_inverse=True)
    similarity = (query.double().numpy() @ unique.T)[:, inverse]
    return torch.from_numpy((similarity >= similarity.diagonal()[:, None]).sum(axis=1) - 1)


@pytest.mark.parametrize("block", [7, 64, 1024])
def test_ranks_of_integer_descriptors_equal_exact_arithmetic(block):
    generator = torch.Generator().manual_seed(0)
    query, reference = torch.randint(-3, 4, (2, 300, 6), generator=generator)
    similarity = query @ reference.T  # integers: exact, and full of ties between unlike descriptors
    expected = (similarity >= similarity.diagonal()[:, None]).sum(dim=1) - 1
    assert torch.equal(rank_matches(query / 8, reference / 8, block=block).match_rank, expected)


@pytest.mark.parametrize(("size", "block"), [(16, 300), (512, 256), (4096, 1024)])
def test_ranks_of_clustered_descriptors_with_copies_equal_a_float64_ranking(size, block):
    query, reference = _clustered(num=1100, size=size, num_centres=20)
    expected = _float64_ranks(query, reference)
    assert torch.equal(rank_matches(query, reference, block=block).match_rank, expected)


def test_differences_below_float32_are_still_ranked():
    generator = torch.Generator().manual_seed(0)
    base = _random(1, 256).expand(300, -1)
    reference = base * (1 + 2e-7 * torch.randint(-4, 5, base.shape, generator=generator))
    query = base * (1 + 1e-3 * torch.randn(base.shape, generator=generator))
    expected = _float64_ranks(query, reference)
    similarity = query @ reference.T
    in_float32 = (similarity >= similarity.diagonal()[:, None]).sum(dim=1) - 1
    assert not torch.equal(in_float32, expected), "the case is too easy"
    assert torch.equal(rank_matches(query, reference, block=128).match_rank, expected)


@pytest.mark.parametrize("block", [13, 64, 1024])
def test_a_collapsed_model_scores_nothing(block):
    collapsed = _random(1, 96).expand(100, -1)
    result = rank_matches(collapsed, collapsed, block=block)
    assert torch.equal(result.match_rank, torch.full((100,), 99))
    metrics = result.metrics()
    assert [value for name, value in metrics.items() if name.startswith("recall")] == [0, 0, 0, 0]
    assert metrics["chance"] == 0.01


def test_descriptors_that_are_all_zero_score_nothing():
    assert rank_matches(torch.zeros(20, 8), torch.zeros(20, 8)).recall_at(19) == 0


def test_a_single_pair_is_found():
    result = rank_matches(_random(1, 8), _random(1, 8, seed=1))
    assert result.match_rank.tolist() == [0]
    assert result.recall_at(1) == 1


def test_a_copy_of_the_true_reference_counts_against_the_query():
    descriptors = _random(10, 32)
    reference = torch.cat([descriptors, descriptors[:1]])
    assert rank_matches(descriptors, reference).match_rank.tolist() == [1] + [0] * 9


def test_targets_say_where_the_true_references_are():
    reference = _random(50, 32)
    target = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:20]
    assert rank_matches(reference[target], reference, target=target).recall_at(1) == 1
    for target in (50, -1):
        with pytest.raises(ValueError, match=f"target names references {target} to {target}, but there are 0 to 49"):
            rank_matches(reference[:1], reference, target=torch.tensor([target]))


def test_query_and_reference_are_not_exchanged():
    query = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    reference = torch.tensor([[0.9, 0.0], [1.0, 0.0]])  # the second one is nearer to both queries
    assert rank_matches(query, reference).match_rank.tolist() == [1, 0]


@pytest.mark.parametrize("block", [4, 16, 1024])
def test_hits_within_a_distance_equal_a_loop(block):
    generator = torch.Generator().manual_seed(0)
    query, reference = torch.randint(-2, 3, (2, 40, 4), generator=generator)
    query_m, reference_m = 12 * torch.rand(2, 40, 3, dtype=torch.float64, generator=generator) + 4e6
    query_m[3] = math.nan  # unknown: its own reference alone is a hit
    hits = HitDistance(query_location_m=query_m, reference_location_m=reference_m, distance_m=5.0)
    expected = []
    for i in range(40):
        near = [j for j in range(40) if j == i or math.dist(query_m[i].tolist(), reference_m[j].tolist()) < 5]
        scores = (reference @ query[i]).tolist()
        best = max(scores[j] for j in near)
        expected.append(sum(scores[j] >= best for j in range(40) if j not in near))
    result = rank_matches(query.float(), reference.float(), hits=hits, block=block)
    assert result.match_rank.tolist() == expected
    assert result.recall_at(1) > rank_matches(query.float(), reference.float()).recall_at(1)


@pytest.mark.parametrize("block", [5, 1024])
def test_best_references_are_listed_in_order(block):
    query, reference = _random(30, 16), _random(40, 16, seed=1)
    result = rank_matches(query, reference, num_top=6, block=block)
    expected = (query @ reference.T).sort(dim=1, descending=True)
    assert torch.equal(result.top_indices, expected.indices[:, :6])
    torch.testing.assert_close(result.top_scores, expected.values[:, :6])
    torch.testing.assert_close(result.match_score, (query * reference[:30]).sum(dim=1))
    found = result.top_indices == torch.arange(30)[:, None]
    assert torch.equal(found.any(dim=1), result.match_rank < 6)


def test_fewer_references_than_asked_for_are_all_listed():
    assert rank_matches(_random(3, 8), _random(3, 8, seed=1)).top_indices.shape == (3, 3)


def _with_ranks(ranks: list[int], num_references: int, one_percent: str = "cvft") -> RetrievalResult:
    return RetrievalResult(
        match_rank=torch.tensor(ranks),
        match_score=torch.zeros(len(ranks)),
        target=torch.arange(len(ranks)),
        top_indices=torch.zeros(len(ranks), 0, dtype=torch.int64),
        top_scores=torch.zeros(len(ranks), 0),
        num_references=num_references,
        one_percent=one_percent,
    )


@pytest.mark.parametrize(
    ("num_references", "one_percent", "k"),
    [(8884, "cvft", 89), (8884, "floor", 88), (100, "cvft", 2), (100, "floor", 1), (7, "cvft", 1), (7, "floor", 1)],
)
def test_one_percent_follows_the_named_convention(num_references, one_percent, k):
    result = _with_ranks([k - 1, k], num_references, one_percent)
    assert result.one_percent_k == k
    assert result.metrics()["recall_at_1_percent"] == 0.5


def test_metrics_count_ranks_from_zero():
    assert _with_ranks([0, 0, 1, 4, 5, 9, 10, 800], 1000).metrics() == {
        "recall_at_1": 2 / 8,
        "recall_at_5": 4 / 8,
        "recall_at_10": 6 / 8,
        "recall_at_1_percent": 7 / 8,
        "chance": 0.001,
        "num_queries": 8,
        "num_references": 1000,
        "median_rank": 4.5,
    }
    assert _with_ranks([0], 4).chance_at(10) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_descriptors_that_are_not_finite_are_named(value):
    broken = _random(12, 4)
    broken[[3, 8], 2] = value
    with pytest.raises(TrainingError, match=r"2 of 12 query descriptors are not finite, first in rows \[3, 8\]"):
        rank_matches(broken, _random(12, 4))
    with pytest.raises(TrainingError, match="2 of 12 reference descriptors"):
        rank_matches(_random(12, 4), broken)


def test_an_empty_split_is_refused():
    with pytest.raises(TrainingError, match="no query descriptor"):
        rank_matches(torch.empty(0, 4), torch.empty(0, 4))


def test_ranking_ignores_autocast_and_leaves_the_precision_settings_as_they_were():
    query, reference = _clustered(num=200, size=64, num_centres=4)
    expected = rank_matches(query, reference).match_rank
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    torch.set_float32_matmul_precision("medium")
    try:
        before = [backend.fp32_precision for backend in backends]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = rank_matches(query, reference).match_rank
        assert [backend.fp32_precision for backend in backends] == before == ["tf32", "bf16"]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, expected)


class _LargestResult(TorchDispatchMode):
    """Notes the bytes of the largest storage that any operation returns."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        own = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in own:
                self.num_bytes = max(self.num_bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("is_collapsed", [False, True])
def test_no_tensor_outgrows_a_block(is_collapsed):
    num, size, block = 1500, 48, 100
    query = _random(num, size, seed=1)
    reference = _random(1, size).expand(num, -1).contiguous() if is_collapsed else _random(num, size)
    hits = HitDistance(query_location_m=torch.zeros(num, 3), reference_location_m=torch.ones(num, 3), distance_m=1.0)
    with _LargestResult() as largest:
        rank_matches(query, reference, hits=hits, block=block)
    result_bytes = 8 * num * 10
    assert 8 * block**2 <= largest.num_bytes <= max(16 * block**2, result_bytes)  # a dense matrix has 56 times as many
