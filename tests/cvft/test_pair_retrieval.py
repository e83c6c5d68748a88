import torch
from torch import Tensor
from torch.nn import functional

from cvft.pair_retrieval import rank_pairs
from cvft.retrieval import rank_matches


def _random(num: int, size: int, seed: int) -> Tensor:
    return functional.normalize(torch.randn(num, size, generator=torch.Generator().manual_seed(seed)), dim=1)


def _pairs_of_locations(num: int, num_locations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ground and aerial descriptors and locations, in no order; pairs of one location have the same aerial image."""
    location = torch.randint(num_locations, (num,), generator=torch.Generator().manual_seed(2)) * 7 - 3
    _, code = location.unique(return_inverse=True)
    aerial = _random(num_locations, 12, seed=0)[code]
    ground = functional.normalize(aerial + 1.2 * _random(num, 12, seed=1), dim=1)
    return ground, aerial, location


def _brute_force(ground: Tensor, aerial: Tensor, location: Tensor) -> list[int]:
    """Count for every query the other locations whose first aerial image is at least as similar as its own's."""
    first: dict[int, int] = {}
    for row, name in enumerate(location.tolist()):
        first.setdefault(name, row)
    similarity = ground.double() @ aerial.double().T
    ranks = []
    for query, name in enumerate(location.tolist()):
        own = similarity[query, first[name]]
        ranks.append(sum(bool(similarity[query, row] >= own) for other, row in first.items() if other != name))
    return ranks


def test_ranks_among_locations_equal_brute_force():
    ground, aerial, location = _pairs_of_locations(num=150, num_locations=40)
    result = rank_pairs(ground, aerial, location=location, block=32)
    assert result.match_rank.tolist() == _brute_force(ground, aerial, location)
    assert result.num_references == len(location.unique())
    assert 0 < result.recall_at(1) < 1


def test_references_are_named_by_the_first_pair_of_their_location():
    ground, aerial, location = _pairs_of_locations(num=90, num_locations=30)
    result = rank_pairs(ground, aerial, location=location, num_top=30)
    first = torch.stack([(location == name).nonzero()[0, 0] for name in location])
    assert torch.equal(result.target, first)
    assert torch.equal(result.top_indices[:, 0] == result.target, result.match_rank == 0)
    assert set(result.top_indices.flatten().tolist()) == set(first.tolist())


def test_pairs_with_locations_of_their_own_are_ranked_row_against_row():
    ground, aerial = _random(60, 8, seed=0), _random(60, 8, seed=1)
    expected = rank_matches(ground, aerial)
    for location in (None, torch.arange(60), torch.arange(60).flip(0)):
        result = rank_pairs(ground, aerial, location=location)
        assert torch.equal(result.match_rank, expected.match_rank)
        assert torch.equal(result.target, torch.arange(60))
        assert torch.equal(result.top_indices, expected.top_indices)


def test_hits_by_distance_equal_brute_force_over_the_ranking():
    ground, aerial, location = _pairs_of_locations(num=120, num_locations=60)
    generator = torch.Generator().manual_seed(3)
    place = torch.rand(60 * 7, 2, generator=generator, dtype=torch.float64) * 40
    place[location.min() + 3] = torch.nan
    location_m = place[location + 3] + torch.rand(120, 2, generator=generator, dtype=torch.float64)
    result = rank_pairs(ground, aerial, location=location, location_m=location_m, hit_distance_m=5.0)
    first = [int((location == name).nonzero()[0, 0]) for name in location.unique()]
    order = (ground.double() @ aerial[first].double().T).argsort(dim=1, descending=True)
    for query in range(120):
        is_hit = [
            location[first[place]] == location[query] or (location_m[first[place]] - location_m[query]).norm() < 5
            for place in order[query].tolist()
        ]
        assert int(result.match_rank[query]) == is_hit.index(True)
    exact = rank_pairs(ground, aerial, location=location)
    assert (result.match_rank <= exact.match_rank).all()
    assert (result.match_rank < exact.match_rank).any()


def test_result_of_some_queries_keeps_all_references():
    ground, aerial = _random(200, 4, seed=0), _random(200, 4, seed=1)
    result = rank_pairs(ground, aerial)
    is_kept = torch.arange(200) % 3 == 0
    part = result.of_queries(is_kept)
    assert torch.equal(part.match_rank, result.match_rank[is_kept])
    assert (part.num_references, part.one_percent_k) == (200, 3)
    assert part.recall_at(10) == (result.match_rank[is_kept] < 10).double().mean().item()
    assert part.recalls("_deleaked").keys() == {f"{name}_deleaked" for name in result.recalls()}
