from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import PathPatch

from cvft.retrieval import RetrievalResult, rank_matches
from pipeline.report.charts import location_figure, recall_figure, training_figure
from pipeline.report.contents import TransportExample
from pipeline.report.flow import (
    MAX_PER_CELL,
    NUM_CELLS,
    effective_sources,
    source_colours,
    strongest_flows,
    target_colours,
    transport_figure,
)
from pipeline.report.gallery import best_and_worst, format_distance, retrieval_figure, shown_references
from pipeline.report.style import RIGHT, WRONG_AHEAD, WRONG_BEHIND, rasterise


def images(index):
    ground = np.full((28, 154, 3), 40 + index, dtype=np.uint8)
    aerial = np.full((64, 64, 3), 90 + index, dtype=np.uint8)
    return ground, aerial


def result_with_rank(match_rank, num_references=9):
    """Query 0 has its true reference at `match_rank`; every other query has it first."""
    others = [index for index in range(num_references) if index != 0]
    first = [*others[:match_rank], 0, *others[match_rank:]]
    rows = [first] + [[i] + [j for j in range(num_references) if j != i] for i in others]
    scores = torch.linspace(0.9, 0.1, num_references).repeat(num_references, 1)
    ranks = torch.zeros(num_references, dtype=torch.int64)
    ranks[0] = match_rank
    return RetrievalResult(
        match_rank=ranks,
        match_score=torch.gather(scores, 1, ranks[:, None])[:, 0],
        target=torch.arange(num_references),
        top_indices=torch.tensor(rows)[:, :7],
        top_scores=scores[:, :7],
        num_references=num_references,
    )


def frames(figure):
    """Colour of each framed photo, left to right."""
    spines = [axes.spines["left"] for axes in figure.axes]
    return [to_hex(spine.get_edgecolor()) for spine in spines if spine.get_visible()]


def texts(figure):
    return [text.get_text() for text in figure.texts]


def test_reference_that_a_query_shares_with_another_pair_is_the_green_one():
    result = replace(result_with_rank(0), target=torch.full((9,), 0))
    assert [shown.frame for shown in shown_references(3, result, None)][:2] == [WRONG_AHEAD, RIGHT]


def test_wrong_references_ahead_are_red_the_right_one_green_and_those_behind_grey():
    figure = retrieval_figure(0, result=result_with_rank(2), images=images)
    assert frames(figure) == [WRONG_AHEAD, WRONG_AHEAD, RIGHT, WRONG_BEHIND, WRONG_BEHIND]


def test_a_right_reference_beyond_the_first_five_is_added_with_its_own_rank_and_score():
    result = result_with_rank(8)
    figure = retrieval_figure(0, result=result, images=images)
    assert frames(figure) == [WRONG_AHEAD] * 5 + [RIGHT]
    assert texts(figure)[-1] == "#9 · 0.100"


def test_ranks_scores_and_distances_are_written_on_the_photos():
    locations_m = np.stack([np.arange(9) * 600.0, np.zeros(9), np.zeros(9)], axis=1)
    figure = retrieval_figure(0, result=result_with_rank(1), images=images, locations_m=locations_m)
    assert texts(figure)[:4] == [
        "query 0 · the right place came #2",
        "#1 · 0.900 · 600 m",
        "#2 · 0.800 · 0 m",
        "#3 · 0.700 · 1.2 km",
    ]


def test_an_unknown_location_gives_no_distance():
    shown = shown_references(0, result_with_rank(0), np.full((9, 2), np.nan))
    assert [item.distance_m for item in shown] == [None] * 5


@pytest.mark.parametrize(
    ("distance_m", "text"), [(0.4, "0 m"), (999, "999 m"), (1500, "1.5 km"), (2_345_678, "2,346 km")]
)
def test_distances_are_written_as_a_person_would(distance_m, text):
    assert format_distance(distance_m) == text


def test_best_and_worst_queries_are_the_extremes_and_never_the_same():
    best, worst = best_and_worst(result_with_rank(8), 2)
    assert worst[0] == 0
    assert not set(best.tolist()) & set(worst.tolist())
    best, worst = best_and_worst(rank_matches(torch.eye(1), torch.eye(1)), 4)
    assert (best.tolist(), worst.tolist()) == ([0], [])


@pytest.mark.parametrize("num_examples", [0, -1])
def test_no_queries_are_chosen_where_none_are_asked_for(num_examples):
    assert [chosen.tolist() for chosen in best_and_worst(result_with_rank(8), num_examples)] == [[], []]


def test_recall_figure_draws_the_recalls_counted_one_by_one():
    match_rank = np.array([0, 0, 3, 7, 19])
    axes = recall_figure(match_rank, num_references=20).axes[0]
    k, recall = axes.lines[0].get_data()
    assert recall.tolist() == [np.mean([rank < value for rank in match_rank]) for value in k]
    assert axes.lines[1].get_ydata().tolist() == [value / 20 for value in k]
    assert [text.get_text() for text in axes.texts] == ["40.0%", "60.0%", "80.0%"]


def test_training_figure_draws_what_was_measured_and_skips_what_was_not():
    history = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0, "recall_at_1": 0.25}]
    loss_axes, recall_axes = training_figure(history).axes
    assert loss_axes.lines[0].get_ydata().tolist() == [2.0, 1.0]
    assert [line.get_xydata().tolist() for line in recall_axes.lines] == [[[2.0, 0.25]]]


def test_location_figure_keeps_true_distances_and_leaves_unknown_places_out():
    train = np.array([[60.0, 25.0], [60.0, 25.01], [np.nan, np.nan]])
    axes = location_figure({"train": train, "val": train[:1] + 0.001}).axes[0]
    (points, _) = axes.collections
    east, north = np.asarray(points.get_offsets()).T
    assert len(east) == 2
    assert np.hypot(east[1] - east[0], north[1] - north[0]) == pytest.approx(556, rel=0.01)  # cos(60°) * 1112 m
    assert axes.get_xlabel() == "east (m)"


def test_colours_and_flows_follow_a_permutation_exactly():
    rng = np.random.default_rng(0)
    source_of = rng.permutation(64)
    plan = np.zeros((64, 64))
    plan[source_of, np.arange(64)] = 1.0
    example = TransportExample(index=0, plan=plan, source_grid=(8, 8), target_grid=(8, 8))
    np.testing.assert_allclose(target_colours(example), source_colours((8, 8))[source_of])
    np.testing.assert_allclose(effective_sources(plan), 1.0)
    flows = strongest_flows(plan, (8, 8))
    assert len(flows) == NUM_CELLS
    assert all(flow.source == source_of[flow.target] and flow.share == 1.0 for flow in flows)


def test_a_uniform_plan_gives_one_grey_and_no_lines():
    plan = np.full((64, 64), 1 / 64)
    example = TransportExample(index=0, plan=plan, source_grid=(8, 8), target_grid=(8, 8))
    colours = target_colours(example)
    assert np.ptp(colours) < 0.01
    np.testing.assert_allclose(effective_sources(plan), 64.0)
    assert strongest_flows(plan, (8, 8)) == []


def test_shares_do_not_depend_on_the_mass_of_a_column():
    plan = np.random.default_rng(1).random((12, 6))
    scaled = plan * np.array([1, 2, 3, 4, 5, 6])
    np.testing.assert_allclose(effective_sources(plan), effective_sources(scaled))
    flows = strongest_flows(scaled, (2, 3))
    assert max([flow.target for flow in flows].count(cell) for cell in range(6)) <= MAX_PER_CELL


def test_transport_figure_draws_a_line_for_each_flow_over_grids_of_any_size():
    plan = np.random.default_rng(2).random((4 * 20, 36)) ** 30
    example = TransportExample(index=3, plan=plan, source_grid=(4, 20), target_grid=(6, 6))
    ground, aerial = images(3)
    figure = transport_figure(example, ground=ground, aerial=aerial)
    flows = strongest_flows(plan, (6, 6))
    lines = [child for child in figure.get_children() if isinstance(child, PathPatch)]
    assert len(lines) == 2 * len(flows) > 0  # each has a dark rim
    assert "the plan: 80 panorama rows, 36 aerial columns" in texts(figure)
    assert rasterise(figure).size[0] == 1200
