import itertools
import math
import re
import statistics
from dataclasses import replace

import numpy as np
import pytest

from pipeline.report.search_axes import Axis, axis_of, format_value, short_name
from pipeline.report.search_figures import curves_figure, importance_figure, lineage_figure
from pipeline.report.search_importance import MIN_TRIALS, importances_of
from pipeline.report.search_lines import UNSET, lines_of
from pipeline.report.search_page import write_search_report
from pipeline.report.search_parallel import parallel_figure, wrapped_name
from pipeline.report.search_words import counts_sentence, outcome_of
from pipeline.search import Parameter, SearchResult, SearchTrial
from tests.pipeline.search_example import PARAMETERS, comparison, search
from tests.pipeline.test_report_page import Page

LONG = "model." + "very_long_section_name_" * 3 + ".a_key"


def trial(number, values, recall=0.5, *, status="finished", epochs=(1,), **changes):
    evaluations = tuple({"epoch": epoch, "step": epoch, "recall_at_1": recall} for epoch in epochs)
    return SearchTrial(name=f"t{number}", values=values, status=status, evaluations=evaluations, **changes)


def result_of(parameters, trials, **changes):
    return SearchResult(
        name="s", about="a search", metric="recall_at_1", parameters=tuple(parameters), trials=tuple(trials), **changes
    )


def read(result, out):
    files = write_search_report(result, out)
    html = files.html.read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not re.search(r"https?://|//cdn|@import|url\(", html)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files.pngs)
    return files, html, " ".join(" ".join(page.text).split())


# --- what mattered


def test_importances_equal_the_shares_of_variance_on_a_full_grid():
    """The oracle: on a full grid of an additive function a main effect is the variance of its own term.

    A point of a range stands for all that is nearer to it than to another: half as much at the ends.
    """
    rates, kinds, others = (1e-4, 1e-3, 1e-2, 1e-1, 1.0), ("p", "q", "r"), (0, 1, 2)
    terms = {rate: 0.08 * math.log10(rate) for rate in rates}, {kind: 0.15 * kinds.index(kind) for kind in kinds}
    trials = [
        trial(number, {"rate": rate, "kind": kind, "other": other}, 0.5 + terms[0][rate] + terms[1][kind])
        for number, (rate, kind, other) in enumerate(itertools.product(rates, kinds, others))
    ]
    parameters = [
        Parameter(name="rate", kind="float", low=1e-4, high=1.0, is_log=True),
        Parameter(name="kind", kind="choice", choices=kinds),
        Parameter(name="other", kind="int", low=0, high=2),
    ]
    found = importances_of(result_of(parameters, trials))
    rate_terms = np.array([*terms[0].values()])
    variances = {
        "rate": np.cov(rate_terms, aweights=[1, 2, 2, 2, 1], ddof=0),
        "kind": statistics.pvariance(terms[1].values()),
    }
    shares = {importance.name: importance.share for importance in found.found}
    for name, variance in variances.items():
        assert shares[name] == pytest.approx(variance / sum(variances.values()), abs=0.07)  # a forest sees combinations
    assert shares["other"] < 0.01
    assert {one.name for one in found.found if one.stands_out} == {"rate", "kind"}


def test_what_shuffles_give_by_luck_is_not_called_important():
    random = np.random.default_rng(3)
    trials = [trial(number, {"x": random.random()}, random.random()) for number in range(12)]
    (found,) = importances_of(result_of([Parameter(name="x", kind="float", low=0, high=1)], trials)).found
    assert found.share > 0.2  # a forest finds a share in anything
    assert not found.stands_out


def test_trials_are_compared_at_the_last_epoch_that_all_have_and_failed_ones_are_left_out():
    def run(number, x, recalls, **changes):
        evaluations = tuple({"epoch": place + 1, "recall_at_1": value} for place, value in enumerate(recalls))
        return SearchTrial(name=f"t{number}", values={"x": x}, evaluations=evaluations, **changes)

    # At epoch 2 the recall is x; later it is turned round, and what failed would spoil it as well.
    trials = [run(n, n / 10, [0.0, n / 10, 1 - n / 10], status="finished") for n in range(6)]
    trials += [run(n, n / 10, [0.0, n / 10], status="stopped") for n in range(6, 11)]
    trials += [run(20, 0.0, [1.0], status="failed"), run(21, 0.0, [], status="stopped")]
    found = importances_of(result_of([Parameter(name="x", kind="float", low=0, high=1)], trials))
    assert (found.epoch, found.num_trials) == (2, 11)
    assert found.left_out == {"failed": 1, "without an evaluation": 1}
    assert found.found[0].share > 0.9


def test_conditional_parameters_are_measured_on_the_trials_that_have_them():
    trials = [trial(n, {"kind": "b", "depth": n % 5}, 0.1 * (n % 5)) for n in range(10)]
    trials += [trial(100 + n, {"kind": "a"}, 0.2) for n in range(10)]
    parameters = [
        Parameter(name="kind", kind="choice", choices=("a", "b")),
        Parameter(name="depth", kind="int", low=0, high=4),
        Parameter(name="never", kind="int", low=0, high=4),
    ]
    found = importances_of(result_of(parameters, trials))
    assert {one.name: one.num_trials for one in found.found} == {"kind": 20, "depth": 10}
    assert next(one for one in found.found if one.name == "depth").share > 0.9
    assert found.missing == {"never": f"0 trials to compare, {MIN_TRIALS} are needed"}


@pytest.mark.parametrize(
    ("trials", "reason"),
    [
        ([trial(n, {"x": n / 9}) for n in range(9)], "all 9 trials that have it reached the same"),
        ([trial(n, {"x": 0.5}, n / 9) for n in range(9)], "all 9 trials that have it have the same value"),
        ([trial(n, {"x": n / 9}, n / 9) for n in range(4)], "4 trials to compare, 5 are needed"),
        ([], "0 trials to compare, 5 are needed"),
    ],
)
def test_what_cannot_be_computed_says_why(trials, reason):
    found = importances_of(result_of([Parameter(name="x", kind="float", low=0, high=1)], trials))
    assert (found.found, found.missing) == ((), {"x": reason})


# --- axes and lines


def test_places_on_logarithmic_and_linear_axes():
    log = Axis(name="x", low=1e-4, high=1.0, is_log=True)
    assert [log.place(value) for value in (1e-4, 1e-2, 1.0)] == pytest.approx([0, 0.5, 1])
    assert [log.place(value) for value in (0, -1, None, "a")] == [None] * 4
    assert [tick.text for tick in log.ticks][:3] == ["0.0001", "0.0003", "0.001"]
    whole = Axis(name="x", low=1, high=4, is_whole=True)
    assert [(tick.place, tick.text) for tick in whole.ticks] == [(0, "1"), (1 / 3, "2"), (2 / 3, "3"), (1, "4")]
    assert Axis(name="x", low=2, high=2).place(2) == 0.5
    assert [tick.text for tick in Axis(name="x", low=2, high=2).ticks] == ["2"]


def test_categories_tell_true_from_one_and_hold_null():
    axis = axis_of(Parameter(name="x", kind="choice", choices=(True, 1, None, "a"), default="other"), [])
    assert [axis.place(value) for value in (True, 1, None, "a", "other")] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert axis.place("unknown") is None
    assert [tick.text for tick in axis.ticks] == ["true", "1", "null", "a", "other"]


def test_an_axis_reaches_to_the_default_and_to_values_that_left_their_range():
    parameter = Parameter(name="x", kind="float", low=1, high=10, is_log=True, default=0.5)
    axis = axis_of(parameter, [trial(0, {"x": 20.0}), trial(1, {})])
    assert (axis.low, axis.high) == (0.5, 20)
    assert axis_of(replace(parameter, default=0.0), []).low == 1  # 0 has no place on a logarithmic axis


def test_every_evaluated_trial_is_a_line_and_what_it_lacks_stands_below():
    result = search(24)
    lines = lines_of(result)
    evaluated = [one for one in result.trials if one.evaluations]
    assert {line.trial.name for line in lines.lines} == {one.name for one in evaluated}
    assert lines.lines[-1].is_best
    for line in lines.lines:
        for axis, place in zip(lines.axes, line.places, strict=True):
            is_there = axis.name in line.trial.values or axis.name == "recall_at_1"
            assert (0 <= place <= 1) if is_there else place == pytest.approx(UNSET, abs=0.02)
    at = [axis.name for axis in lines.axes].index("train.optimizer.learning_rate")
    for line in lines.lines:
        rate = line.trial.values["train.optimizer.learning_rate"]
        assert line.places[at] == pytest.approx((math.log10(rate) + 5) / 3)
    shades = [line.shade for line in sorted(lines.lines, key=lambda line: line.value)]
    assert shades == sorted(shades)
    assert lines.default[0] == pytest.approx(1 / 3)
    assert lines.default[3] is None


def test_the_picture_has_a_line_for_each_trial_and_the_curves_have_their_numbers():
    result = search(24)
    evaluated = {one.name: one for one in result.trials if one.evaluations}
    assert len(parallel_figure(result).axes[0].patches) == len(evaluated)
    axes = curves_figure(result).axes[0]
    curves = {line.get_gid(): line for line in axes.lines if line.get_gid() in evaluated}
    assert curves.keys() == evaluated.keys()
    for name, line in curves.items():
        points = [[found["epoch"], found["recall_at_1"]] for found in evaluated[name].evaluations]
        assert line.get_xydata().tolist() == points
    ends = [line.get_xdata() for line in axes.lines if line.get_gid() not in evaluated]
    assert {float(rung) for rung in result.rungs} <= {float(end[0]) for end in ends if end[0] == end[-1]}


def test_names_are_wrapped_at_dots_and_shortened_while_they_stay_distinct():
    assert wrapped_name("train.loss.gamma") == "train.loss.gamma"
    assert wrapped_name("train.optimizer.learning_rate") == "train.optimizer.\nlearning_rate"
    assert all(len(line) <= 20 for line in wrapped_name(LONG).split("\n"))
    assert short_name("a.b.c", ["a.b.c", "a.d.c"]) == "b.c"
    assert short_name("a.b.c", ["a.b.c", "a.d.e"]) == "c"
    assert [format_value(value) for value in (None, True, 3, 1e-5, 0.123456, "x")] == [
        "null", "true", "3", "1e-05", "0.1235", "x",
    ]  # fmt: skip


# --- words


@pytest.mark.parametrize(
    ("gain", "noise", "kind", "words"),
    [
        (0.08, 0.01, "better", "t1 is better than the default: recall@1 "),
        (0.001, 0.03, "tie", "A tie: t1 cannot be told from the default."),
        (-0.2, 0.01, "worse", "t1 is worse than the default"),
    ],
)
def test_the_outcome_is_better_a_tie_or_worse_by_the_interval(gain, noise, kind, words):
    compared = comparison("t1", gain=gain, noise=noise)
    outcome = outcome_of(result_of([], [trial(1, {})], best="t1", comparison=compared))
    tuned = compared[1]
    assert outcome.kind == kind
    assert words in outcome.sentence
    for number in (tuned.means["recall_at_1"], compared[0].means["recall_at_1"]):
        assert f"{100 * number:.2f} %" in outcome.sentence
    assert f"{100 * tuned.difference:+.2f} ± {100 * tuned.half_width:.2f} percentage points" in outcome.sentence
    assert "over 5 seeds that the search did not use (95% interval" in outcome.sentence


def test_without_seeds_of_their_own_or_with_one_the_outcome_is_open():
    alone = result_of([], [trial(1, {}, 0.4)], best="t1")
    assert outcome_of(alone).kind == "open"
    assert (
        outcome_of(alone).sentence == "t1 reached recall@1 40.00 %, the highest of 1 trial that was trained to the end."
    )
    assert "partly luck" in outcome_of(alone).advice
    others = [trial(2, {}, 0.4), trial(3, {}, 0.3), trial(4, {}, 0.9, status="stopped")]
    several = replace(alone, trials=(*alone.trials, *others), chance=0.4)
    assert outcome_of(several).sentence == (
        "t1 and 1 other reached recall@1 40.00 %, the highest of 3 trials that were trained to the end."
    )
    assert "no more than a guess" in outcome_of(several).advice
    once = replace(alone, comparison=comparison("t1", num_seeds=1))
    assert outcome_of(once).kind == "open"
    assert "over 1 seed that" in outcome_of(once).sentence
    assert outcome_of(replace(alone, comparison=comparison("t1")[:1])).kind == "open"


def test_trials_are_counted_by_what_became_of_them():
    trials = [trial(0, {}), trial(1, {}, status="failed", epochs=()), trial(2, {}, status="failed", epochs=())]
    assert counts_sentence(result_of([], trials, chance=0.01)) == (
        "3 trials: 1 trained to the end, 2 failed. A guess reaches 1.00 %."
    )


# --- the page


def test_the_page_tells_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.report.search_importance.NUM_SHUFFLES", 2)
    result = search(9)
    files, html, text = read(result, tmp_path)
    assert [path.stem for path in files.pngs] == [
        "parallel_coordinates", "importance", "learning_curves", "comparison",
    ]  # fmt: skip
    evaluated = [one for one in result.trials if one.evaluations]
    assert len(re.findall(r'<path class="trial shade\d', html)) == len(evaluated) + 1  # one is in the legend
    assert len(re.findall(r'<path class="hit"', html)) == len(evaluated)
    assert len(re.findall(r"<tr data-trial=", html)) == len(result.trials)
    for one in evaluated:
        assert f"{100 * one.best('recall_at_1'):.2f} %" in text
    assert f"{result.best} is better than the default" in text
    assert "step 31: the loss is nan" in text
    assert "after epoch 2, 6" in text


def test_names_and_reasons_are_escaped(tmp_path):
    evil = '<script>alert("x")</script>'
    one = replace(trial(1, {evil: evil}, status="failed"), name=evil, reason=evil)
    parameter = Parameter(name=evil, kind="choice", choices=(evil,), default=evil)
    result = replace(result_of([parameter], [one], best=evil), name=evil, about=evil)
    _, html, text = read(result, tmp_path)
    assert html.count("<script") == 1
    assert evil in text


EMPTY = result_of(PARAMETERS, [])
FAILED = result_of(PARAMETERS, [trial(n, {}, status="failed", epochs=(), reason="no room") for n in range(3)])
ONE = result_of(
    [Parameter(name=LONG, kind="choice", choices=(None, False), default=None)], [trial(0, {LONG: None})], best="t0"
)
SAME = result_of(
    [Parameter(name="x", kind="int", low=1, high=1, default=1)], [trial(n, {"x": 1}, 0.0) for n in range(6)], best="t0"
)
BARE = result_of([], [trial(0, {})], best="t0")
RUNNING = result_of(PARAMETERS, [trial(0, {"train.loss.gamma": 3.0}, status="running")], best="t0")
OTHER = replace(
    result_of([Parameter(name="x", kind="float", low=0, high=1, default=0.1)], []),
    metric="score",
    trials=tuple(
        SearchTrial(
            name=f"t{n}", values={"x": n / 9}, status="finished", evaluations=({"epoch": 1, "score": 30.0 + n},)
        )
        for n in range(3)
    ),
    best="t2",
)


@pytest.mark.parametrize(
    ("result", "pictures", "words"),
    [
        (EMPTY, [], "No trial got as far as an evaluation"),
        (FAILED, [], "3 trials: 3 failed."),
        (ONE, ["parallel_coordinates", "learning_curves"], "t0 reached recall@1 50.00 %, the highest of 1 trial"),
        (SAME, ["parallel_coordinates", "learning_curves"], "all 6 trials that have it have the same value"),
        (BARE, ["learning_curves"], "1 trial: 1 trained to the end."),
        (RUNNING, ["parallel_coordinates", "learning_curves"], "1 not over yet"),
        (OTHER, ["parallel_coordinates", "learning_curves"], "t2 reached score 32, the highest of 3 trials"),
    ],
    ids=["empty", "failed", "one", "same", "bare", "running", "other metric"],
)
def test_degenerate_searches_are_pages_too(result, pictures, words, tmp_path):
    files, _, text = read(result, tmp_path)
    assert [path.stem for path in files.pngs] == pictures
    assert words in text


def test_two_hundred_trials_are_two_hundred_rows(tmp_path):
    trials = [trial(n, {"x": 1.0}, n / 1000) for n in range(200)]
    result = result_of([Parameter(name="x", kind="float", low=0, high=1, default=0.5)], trials, best="t199")
    _, html, _ = read(result, tmp_path)
    assert len(re.findall(r"<tr data-trial=", html)) == len(re.findall(r'class="hit"', html)) == 200


def test_a_search_by_population_shows_whose_weights_were_taken(tmp_path):
    trials = [trial(0, {"x": 0.1}, 0.6), trial(1, {"x": 0.2}, 0.5, donor="t0"), trial(2, {"x": 0.3}, 0.4, donor="t0")]
    result = result_of([Parameter(name="x", kind="float", low=0, high=1)], trials, best="t0")
    files, _, text = read(result, tmp_path)
    assert files.pngs[-1].stem == "lineage"
    assert "weights from" in text
    arrows = [child for child in lineage_figure(result).axes[0].texts if child.arrow_patch is not None]
    assert [(child.xyann, child.xy) for child in arrows] == [((0, 0.6), (1, 0.5)), ((0, 0.6), (2, 0.4))]


def test_the_bars_are_the_importances():
    result = search(8)
    found = importances_of(result)
    axes = importance_figure(found, names=[one.name for one in result.parameters]).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [one.share for one in found.found]
    assert [line.get_xdata()[0] for line in axes.lines] == [one.by_luck for one in found.found]
