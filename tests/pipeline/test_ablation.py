"""Variants are compared seed by seed, with Student's interval; the table and the picture say the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cvft.errors import DataError
from pipeline.ablation import Trial, summarise
from pipeline.report.ablation import ablation_figure, ablation_table
from pipeline.report.style import rasterise


def trials_of(**values: list[float]) -> list[Trial]:
    names = ("recall_at_1", "recall_at_5", "recall_at_10", "recall_at_1_percent")
    return [
        Trial(variant=variant, seed=seed, metrics=dict.fromkeys(names, value))
        for variant, column in values.items()
        for seed, value in enumerate(column)
    ]


def test_the_interval_is_that_of_scipys_paired_t_test():
    conv, cvft = [0.10, 0.14, 0.11, 0.12], [0.22, 0.19, 0.25, 0.21]
    expected = stats.ttest_rel(cvft, conv).confidence_interval(0.95)
    _, of_cvft = summarise(trials_of(conv=conv, cvft=cvft), reference="conv")
    assert of_cvft.difference - of_cvft.half_width == pytest.approx(expected.low)
    assert of_cvft.difference + of_cvft.half_width == pytest.approx(expected.high)
    assert of_cvft.verdict == "better"
    assert of_cvft.deviations["recall_at_5"] == pytest.approx(np.std(cvft, ddof=1))


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6))
def test_swapping_variant_and_reference_turns_the_difference_round(pairs):
    first, second = (list(column) for column in zip(*pairs, strict=True))
    trials = trials_of(first=first, second=second)
    (_, one), (other, _) = (summarise(trials, reference=name) for name in ("first", "second"))
    assert one.difference == pytest.approx(-other.difference, abs=1e-12)
    assert one.half_width == pytest.approx(other.half_width, abs=1e-12)


def test_seeds_that_the_reference_lacks_count_for_the_mean_and_not_for_the_difference():
    trials = [*trials_of(conv=[0.1, 0.2], cvft=[0.3, 0.4, 0.9])]
    _, cvft = summarise(trials, reference="conv")
    assert cvft.means["recall_at_1"] == pytest.approx(1.6 / 3)
    assert cvft.difference == pytest.approx(0.2)


def test_a_difference_smaller_than_its_interval_is_noise_and_one_seed_tells_nothing():
    summaries = summarise(trials_of(conv=[0.1, 0.2, 0.3], cvft=[0.2, 0.1, 0.35], one=[0.9]), reference="conv")
    assert [summary.verdict for summary in summaries] == ["reference", "within the noise", "one seed tells nothing"]


def test_the_comparison_of_a_variant_without_a_common_seed_is_refused():
    lonely = Trial(variant="lonely", seed=7, metrics=trials_of(a=[0.5])[0].metrics)
    with pytest.raises(DataError, match="lonely: no seed in common"):
        summarise([*trials_of(conv=[0.1]), lonely], reference="conv")
    with pytest.raises(DataError, match="reference: 'cvft' was not trained"):
        summarise(trials_of(conv=[0.1]), reference="cvft")


def test_the_table_has_a_row_for_each_variant_in_per_cent():
    lines = ablation_table(summarise(trials_of(conv=[0.1, 0.2], cvft=[0.3, 0.4]), reference="conv")).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| conv", "| cvft"]
    assert "15.00 ± 7.07" in lines[2]
    assert "+20.00 ± 0.00 | better" in lines[3]


def test_the_picture_has_a_dot_for_each_training_and_names_the_variants():
    summaries = summarise(trials_of(conv=[0.1, 0.2], cvft=[0.3, 0.4]), reference="conv")
    figure = ablation_figure(summaries, chance=0.005)
    (axes,) = figure.axes
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in dots] == [[0.1, 0.2], [0.3, 0.4]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv", "cvft"]
    assert math.prod(rasterise(figure).size) > 0
