import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from cvft.configuration import parse
from cvft.errors import ConfigError
from pipeline.bootstrap import Bootstrap, compare, compare_with_chance
from pipeline.promotion import GateConfig, Measured, decide

GATE = GateConfig()


def hits(*counts):
    """Make both models' hits from the numbers of queries that both, the candidate, the champion and neither find."""
    both, candidate, champion, neither = counts
    ours = np.repeat([True, True, False, False], [both, candidate, champion, neither])
    theirs = np.repeat([True, False, True, False], [both, candidate, champion, neither])
    return ours, theirs


def measured(found, **facts):
    return Measured(
        **{"hits": found, "is_deleaked": None, "chance": 0.01, "latency_ms": 10.0, "model_mb": 1.0, **facts}
    )


def verdict(counts, *, gate=GATE, ours=None, theirs=None):
    candidate, champion = hits(*counts)
    return decide(measured(candidate, **(ours or {})), measured(champion, **(theirs or {})), gate=gate)


def test_interval_is_that_of_every_possible_resample():
    candidate, champion = np.array([1, 1, 0, 1, 0, 1], bool), np.array([0, 1, 1, 0, 0, 1], bool)
    difference = candidate.astype(int) - champion
    everything = [np.mean([difference[i] for i in draw]) for draw in itertools.product(range(6), repeat=6)]
    for confidence in (0.5, 0.8, 0.95):
        found = compare(candidate, champion, Bootstrap(confidence=confidence, num_resamples=400_000))
        tail = (1 - confidence) / 2
        exact = np.quantile(everything, [tail, 1 - tail], method="inverted_cdf")
        # All means are sixths; Monte Carlo may only differ where a quantile falls on a step.
        assert np.abs(np.array([found.low, found.high]) - exact).max() < 1e-9
        assert found.gain == pytest.approx(np.mean(difference))


def test_interval_equals_that_of_drawing_the_queries_one_by_one_by_location():
    random = np.random.default_rng(1)
    location = random.integers(0, 60, 200)
    candidate, champion = random.random(200) < 0.6, random.random(200) < 0.45
    found = compare(candidate, champion, Bootstrap(location=location, num_resamples=40_000))
    members = [np.flatnonzero(location == name) for name in np.unique(location)]
    difference = candidate.astype(int) - champion
    means = []
    for _ in range(20_000):
        drawn = np.concatenate([members[k] for k in random.integers(0, len(members), len(members))])
        means.append(difference[drawn].mean())
    # Three standard errors of a quantile of 20,000 draws are about a tenth of the distribution's deviation.
    np.testing.assert_allclose([found.low, found.high], np.quantile(means, [0.025, 0.975]), atol=0.1 * np.std(means))


def test_interval_covers_the_true_difference_as_often_as_it_says():
    random, covered, rounds = np.random.default_rng(2), 0, 600
    for seed in range(rounds):
        kinds = random.choice(4, size=300, p=[0.4, 0.15, 0.1, 0.35])  # both, candidate, champion, neither
        candidate, champion = np.isin(kinds, (0, 1)), np.isin(kinds, (0, 2))
        found = compare(candidate, champion, Bootstrap(num_resamples=1000, seed=seed))
        covered += found.low <= 0.05 <= found.high
    assert binomtest(covered, rounds, 0.95).pvalue > 0.001, covered / rounds


@pytest.mark.parametrize("num_differing", [0, 4, 8, 30, 100])
def test_models_that_are_equally_good_are_told_apart_no_more_often_than_the_gate_says(num_differing):
    # Exactly: over every number of wins that fair coins give, weighted by its probability.
    wrong = 0.0
    for wins in range(num_differing + 1):
        candidate, champion = hits(100, wins, num_differing - wins, 50)
        found = compare(candidate, champion, Bootstrap(num_resamples=2000))
        wrong += (not found.is_tie) * math.comb(num_differing, wins) / 2**num_differing
    assert wrong <= 0.05


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 5)), min_size=1, max_size=40), st.randoms())
def test_the_order_of_the_queries_does_not_matter_and_swapping_the_models_negates(queries, random):
    def found(rows, *, is_swapped=False, has_locations=True):
        ours, theirs, location = (np.array(column) for column in zip(*rows, strict=True))
        how = Bootstrap(num_resamples=1000, location=location if has_locations else None)
        return compare(theirs, ours, how) if is_swapped else compare(ours, theirs, how)

    shuffled = random.sample(queries, len(queries))
    for has_locations in (False, True):
        straight = found(queries, has_locations=has_locations)
        assert found(shuffled, has_locations=has_locations) == straight
        swapped = found(queries, has_locations=has_locations, is_swapped=True)
        assert (swapped.gain, swapped.wins, swapped.losses) == (-straight.gain, straight.losses, straight.wins)
        assert straight.low <= straight.high


def test_equal_seeds_give_equal_intervals_and_others_do_not():
    candidate, champion = hits(1000, 210, 190, 600)
    first, again, other = (compare(candidate, champion, Bootstrap(seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)


def test_a_model_that_answers_alike_gains_exactly_nothing_and_ties():
    found = verdict((70, 0, 0, 30))
    assert found.status == "tie"
    assert (found.difference.gain, found.difference.low, found.difference.high, found.difference.p_value) == (
        0,
        0,
        0,
        1,
    )
    assert "cannot be told apart" in found.reason


def test_pairing_shows_a_gain_that_two_separate_samples_would_not():
    found = verdict((400, 20, 2, 578))
    assert found.status == "promoted"
    apart = math.sqrt(0.42 * 0.58 / 1000 + 0.402 * 0.598 / 1000)
    assert found.difference.gain < 1.96 * apart
    assert "20 queries won, 2 lost" in found.reason


@pytest.mark.parametrize(
    ("counts", "status", "word"),
    [
        ((50, 30, 2, 18), "promoted", "+28.00 points"),
        ((50, 4, 0, 46), "tie", "p = 0.12"),  # its interval lies above 0, but four coins are not enough
        ((50, 12, 9, 29), "tie", "cannot be told apart"),
        ((50, 2, 30, 18), "refused", "-28.00 points"),
        ((5000, 9, 0, 4991), "refused", "the gate asks for +0.50 or more"),  # surely better, but not by enough
    ],
)
def test_better_by_the_margin_is_promoted_equal_ties_and_worse_is_refused_with_the_numbers(counts, status, word):
    found = verdict(counts)
    assert found.status == status
    assert word in found.reason


def test_a_gain_that_comes_from_leaked_queries_is_refused():
    # The candidate knows the 20 leaked queries by heart and lost three others.
    is_deleaked = np.arange(100) >= 20
    candidate, champion = np.zeros(100, bool), np.zeros(100, bool)
    candidate[:20] = True
    candidate[20:60], champion[20:63] = True, True
    ours, theirs = (measured(found, is_deleaked=is_deleaked) for found in (candidate, champion))
    found = decide(ours, theirs, gate=GATE)
    assert found.status == "refused"
    assert found.reason == "without leaked queries -3.75 points, no loss is allowed"
    tolerant = decide(ours, theirs, gate=GateConfig(max_deleaked_loss=0.04))
    assert tolerant.status == "promoted"


@pytest.mark.parametrize(
    ("gate", "ours", "text"),
    [
        ({"max_latency_ms": 20.0}, {"latency_ms": 20.5}, "20.5 ms for a ground image, at most 20 ms"),
        ({"max_latency_ratio": 1.5}, {"latency_ratio": 1.6}, "1.60 times the champion's time, at most 1.5"),
        ({"max_model_mb": 64.0}, {"model_mb": 65.0}, "65.0 MB, at most 64 MB"),
    ],
)
def test_a_better_model_that_is_too_slow_or_too_large_is_refused(gate, ours, text):
    found = verdict((50, 30, 2, 18), gate=GateConfig(**gate), ours=ours)
    assert found.status == "refused"
    assert text in found.reason


@pytest.mark.parametrize(
    ("num_found", "status"), [(0, "refused"), (1, "refused"), (2, "refused"), (8, "promoted"), (100, "promoted")]
)
def test_the_first_champion_must_beat_chance(num_found, status):
    candidate = np.arange(100) < num_found
    assert decide(measured(candidate), None, gate=GATE).status == status
    assert decide(measured(candidate), None, gate=GateConfig(must_beat_chance=False)).status == "promoted"


def test_chance_is_compared_with_by_the_same_bootstrap():
    candidate = np.arange(100) < 30
    found, how = compare_with_chance(candidate, 0.01, Bootstrap()), Bootstrap()
    without = compare(candidate, np.zeros(100, bool), how)
    assert found.gain == pytest.approx(0.29)
    assert (found.low, found.high) == pytest.approx((without.low - 0.01, without.high - 0.01))
    assert found.p_value == binomtest(30, 100, 0.01).pvalue


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("min_gain", 5.0),
        ("confidence", 1.0),
        ("num_resamples", 10),
        ("seed", -1),
        ("max_deleaked_loss", -0.1),
        ("max_latency_ms", 0.0),
        ("max_gain", 0.1),
    ],
)
def test_a_gate_that_cannot_be_meant_is_refused_by_its_key(key, value):
    with pytest.raises(ConfigError, match=key):
        parse(GateConfig, {key: value}, prefix="gate")
