import numpy as np
import pytest
import torch

from cvft.pair_retrieval import rank_pairs
from pipeline.report.distances import PROTOCOL_DISTANCES_M, answer_distances, distance_figure


def tied_descriptors(random, num_pairs, num_values=3):
    """Descriptors of few directions, so that many similarities are equal to the last bit."""
    axes = torch.eye(8)
    return axes[torch.from_numpy(random.integers(0, num_values, num_pairs))]


def brute_force(ground, aerial, location, locations_m):
    """The farthest of the best answers of each query, its own reference only if it beats every other one."""
    first = [int(np.flatnonzero(location == code)[0]) for code in location]
    references = sorted(set(first))
    answers = []
    for query, own in enumerate(first):
        score = {row: float(ground[query].double() @ aerial[row].double()) for row in references}
        others = [row for row in references if row != own]
        if all(score[row] < score[own] for row in others):
            answers.append((True, np.linalg.norm(locations_m[query] - locations_m[own])))
            continue
        best = max(score[row] for row in others)
        distances_m = [np.linalg.norm(locations_m[query] - locations_m[row]) for row in others if score[row] == best]
        answers.append((False, max(np.inf if np.isnan(distance) else distance for distance in distances_m)))
    return answers, references, first


def example(seed, *, num_pairs=24, is_shared=False, is_tied=True, has_unknown=False):
    random = np.random.default_rng(seed)
    if is_tied:
        ground, aerial = tied_descriptors(random, num_pairs), tied_descriptors(random, num_pairs, num_values=6)
    else:
        aerial = torch.nn.functional.normalize(torch.from_numpy(random.normal(size=(num_pairs, 8))).float(), dim=1)
        noise = torch.from_numpy(random.normal(size=(num_pairs, 8))).float()
        ground = torch.nn.functional.normalize(aerial + 0.5 * noise, dim=1)
    location = random.integers(0, 16, num_pairs) if is_shared else np.arange(num_pairs)
    locations_m = np.concatenate([random.integers(0, 60, (num_pairs, 2)), np.zeros((num_pairs, 1))], axis=1)
    locations_m = locations_m.astype(np.float64)
    if has_unknown:
        locations_m[::5] = np.nan
    return ground, aerial, location, locations_m


CASES = [{}, {"is_shared": True}, {"has_unknown": True}, {"is_tied": False}, {"is_shared": True, "has_unknown": True}]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case) or "plain")
def test_first_answers_and_guesses_are_those_counted_one_by_one(case, seed):
    ground, aerial, location, locations_m = example(seed, **case)
    result = rank_pairs(ground, aerial, location=torch.from_numpy(location), num_top=len(ground))
    found = answer_distances(result, locations_m)
    answers, references, first = brute_force(ground, aerial, location, locations_m)
    assert found.is_right.tolist() == [is_right for is_right, _ in answers]
    wrong = [distance for is_right, distance in answers if not is_right]
    np.testing.assert_allclose(found.answer_m[~found.is_right], wrong)
    assert found.num_wrong == len(wrong)
    np.testing.assert_allclose(np.sort(found.wrong_m), np.sort([value for value in wrong if np.isfinite(value)]))
    for limit in (1.0, *PROTOCOL_DISTANCES_M, 40.0):
        is_hit = [
            row == own or np.linalg.norm(locations_m[query] - locations_m[row]) < limit
            for query, own in enumerate(first)
            for row in references
        ]
        assert found.guessed_within([limit])[0] == pytest.approx(np.mean(is_hit))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case) or "plain")
def test_answers_within_a_distance_are_the_recall_of_the_protocol_by_distance(case, seed):
    ground, aerial, location, locations_m = example(seed, **case)
    options = {"location": torch.from_numpy(location), "num_top": len(ground)}
    found = answer_distances(rank_pairs(ground, aerial, **options), locations_m)
    for limit in PROTOCOL_DISTANCES_M:
        within = rank_pairs(ground, aerial, location_m=torch.from_numpy(locations_m), hit_distance_m=limit, **options)
        assert found.found_within([limit])[0] == within.recall_at(1)


def test_without_any_position_there_is_nothing_to_measure():
    ground, aerial, _, locations_m = example(0)
    result = rank_pairs(ground, aerial)
    assert answer_distances(result, np.full_like(locations_m, np.nan)) is None
    assert answer_distances(result, None) is None


def test_a_collapsed_model_finds_nothing_near():
    ground = torch.nn.functional.normalize(torch.ones(6, 4), dim=1)
    locations_m = np.arange(6)[:, None] * np.array([[100.0, 0, 0]])
    found = answer_distances(rank_pairs(ground, ground), locations_m)
    assert found.found_within([25.0]).tolist() == [0.0]
    assert found.guessed_within([25.0]).tolist() == pytest.approx([1 / 6])


def test_guesses_of_a_large_split_are_measured_on_evenly_chosen_queries(monkeypatch):
    ground, aerial, _, locations_m = example(0, num_pairs=60, is_tied=False)
    result = rank_pairs(ground, aerial)
    exact = answer_distances(result, locations_m).guessed_within([25.0])[0]
    monkeypatch.setattr("pipeline.report.distances._MAX_GUESSES", 20 * 60)
    few = answer_distances(result, locations_m)
    assert len(few.guess_m) == 20 * 59
    assert few.guessed_within([25.0])[0] == pytest.approx(exact, abs=0.05)


def test_the_picture_shows_the_measured_distances():
    ground, aerial, _, locations_m = example(1, is_tied=False)
    found = answer_distances(rank_pairs(ground, aerial), 10 * locations_m)
    wrong_axes, within_axes = distance_figure(found).axes
    bars = [patch.get_height() for patch in wrong_axes.patches[:24]]
    assert sum(bars) == pytest.approx(1)
    assert wrong_axes.get_ylabel() == f"part of {found.num_wrong} wrong answers"
    distances_m, recall = within_axes.lines[0].get_data()
    assert recall.tolist() == found.found_within(distances_m).tolist()
    assert [text.get_text() for text in within_axes.texts] == [
        f"{found.found_within([limit])[0]:.1%} at {limit:g} m" for limit in PROTOCOL_DISTANCES_M
    ]


@pytest.mark.parametrize("num_pairs", [1, 2])
def test_a_model_that_is_always_right_and_a_single_pair_have_a_picture(num_pairs):
    eye = torch.eye(num_pairs)
    found = answer_distances(rank_pairs(eye, eye), np.zeros((num_pairs, 3)))
    assert found.num_wrong == 0
    assert found.found_within([5.0]).tolist() == [1.0]
    assert distance_figure(found).axes[0].get_ylabel() == "part of 0 wrong answers"
