"""The most similar references are those of a brute-force search, whatever the blocks and the number of ranks."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from cvft.errors import TrainingError
from cvft.neighbours import most_similar, share_rows
from tests.distributed_helper import run_distributed

CPU = torch.device("cpu")


def brute_force(query, reference, k):
    """Sort all similarities in float64; equal ones by index."""
    similarity = query.double().numpy() @ reference.double().numpy().T
    index = np.broadcast_to(np.arange(similarity.shape[1]), similarity.shape)
    return torch.from_numpy(np.lexsort((index, -similarity), axis=-1)[:, :k]).int()


def whole_numbers(num_rows, seed):
    """Rows whose inner products float32 gets exactly right, with many ties, zeros and negative ones."""
    return torch.randint(-2, 3, (num_rows, 6), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("block", [1, 7, 64, 500])
@pytest.mark.parametrize("k", [1, 5, 90])
def test_ties_are_listed_by_index_in_blocks_of_any_size(k, block):
    query, reference = whole_numbers(50, 0), whole_numbers(90, 1)
    found = most_similar(query, reference, k=k, device=CPU, block=block)
    assert found.dtype == torch.int32
    assert torch.equal(found, brute_force(query, reference, k))


def test_unit_vectors_are_ranked_as_in_float64():
    generator = torch.Generator().manual_seed(0)
    query, reference = (functional.normalize(torch.randn(300, 64, generator=generator), dim=1) for _ in range(2))
    found = most_similar(query, reference, k=20, device=CPU, block=128)
    expected = brute_force(query, reference, 20)
    similarity = query.double() @ reference.double().T
    apart = similarity.gather(1, found.long()) - similarity.gather(1, expected.long())
    assert apart.abs().max() < 1e-6  # places are changed between equals of float32 alone
    assert (found != expected).float().mean() < 0.01


def test_a_collapsed_model_gives_every_query_the_first_references():
    same = functional.normalize(torch.ones(40, 8), dim=1)
    assert torch.equal(most_similar(same, same, k=3, device=CPU, block=16), torch.arange(3).int().expand(40, 3))


def _search(num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    query, reference = (functional.normalize(torch.randn(num_rows, 48, generator=generator), dim=1) for _ in range(2))
    return most_similar(query, reference, k=3, device=CPU, block=16)


def _check_search_of_ranks(expected: dict[int, torch.Tensor]) -> None:
    torch.set_num_threads(1)
    for num_rows, alone in expected.items():
        assert torch.equal(_search(num_rows), alone)


def test_ranks_find_to_the_bit_what_one_process_finds():
    # Fewer blocks than ranks, as many with a last one that is short, and more.
    run_distributed(_check_search_of_ranks, 3, {num_rows: _search(num_rows) for num_rows in (3, 17, 40, 48, 150)})


def test_every_row_is_computed_once():
    seen = []

    def compute(rows):
        seen.extend(range(rows.start, rows.stop))
        return torch.arange(rows.start, rows.stop).int()[:, None].expand(-1, 2)

    assert torch.equal(
        share_rows(11, compute, width=2, device=CPU, block=4), torch.arange(11).int()[:, None].expand(-1, 2)
    )
    assert seen == list(range(11))


def test_descriptors_that_are_not_finite_are_refused():
    bad = torch.eye(4)
    bad[2, 1] = torch.nan
    with pytest.raises(TrainingError, match="1 of 4 reference descriptors are not finite, first in rows \\[2\\]"):
        most_similar(torch.eye(4), bad, k=1, device=CPU)


def test_more_neighbours_than_references_are_refused():
    with pytest.raises(ValueError, match="k: 5 must lie in 1 to 4"):
        most_similar(torch.eye(4), torch.eye(4), k=5, device=CPU)
