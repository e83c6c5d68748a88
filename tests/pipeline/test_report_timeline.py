import numpy as np

from pipeline.report.timeline import Mishap, Stage, timeline_figure

SAMPLES = [(0.0, {}), (1.0, {"cpu": 2}), (2.0, {"cpu": 1}), (3.0, {"cpu": 1, "train": 2}), (4.0, {"train": 0})]


def drawn(**options):
    [axes] = timeline_figure(SAMPLES, stages=[Stage("shard", 0.5, 2.5), Stage("train", 2.5, 4.0)], **options).axes
    return axes


def test_each_type_of_node_is_a_line_of_its_numbers_and_a_type_that_is_missing_has_none():
    axes = drawn()
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {
        "cpu nodes": [[0, 0], [1, 2], [2, 1], [3, 1], [4, 0]],
        "train nodes": [[0, 0], [1, 0], [2, 0], [3, 2], [4, 0]],
    }
    assert [text.get_text() for text in axes.texts] == ["shard", "train"]
    assert [line.get_label() for line in drawn(group="host {}").lines] == ["host cpu", "host train"]


def test_a_lost_node_is_marked_where_it_was_lost_on_the_line_of_its_type():
    marks = [
        line for line in drawn(mishaps=[Mishap(1.5, "cpu"), Mishap(3.2, "train")]).lines if line.get_marker() == "X"
    ]
    np.testing.assert_array_equal([mark.get_xydata()[0] for mark in marks], [[1.5, 2], [3.2, 2]])


def test_a_cluster_without_nodes_can_be_drawn():
    [axes] = timeline_figure([], stages=[]).axes
    assert len(axes.lines) == 0
