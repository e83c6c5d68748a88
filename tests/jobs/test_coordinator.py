"""Ray Train's coordinator, and what an elastic training looks at, where a node comes; on a real Ray."""

import pytest

from jobs.room import has_room
from tests.jobs.clusters import await_true

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.ray

NAME = "AutoscalingCoordinator"


def end_coordinator():
    try:
        ray.kill(ray.get_actor(NAME, namespace=NAME))
    except ValueError:  # there is none
        return


@pytest.fixture
def coordinator(ray_cluster):
    """Ray Train's, which would look by itself when the test has long ended."""
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator  # noqa: PLC0415 (takes a second)

    class Slow(default_autoscaling_coordinator._AutoscalingCoordinatorActor):
        TICK_INTERVAL_S = 1e6

    end_coordinator()
    yield ray.remote(num_cpus=0)(Slow).options(name=NAME, namespace=NAME).remote()
    end_coordinator()


def test_a_node_that_has_come_counts_once_it_was_looked_anew(coordinator, make_node):
    from jobs.training.coordinator import look_anew  # noqa: PLC0415 (imports Ray Train)

    def num_reserved():
        reserved = ray.get(coordinator.get_reserved_resources.remote("training"))
        return sum(resources.get("CPU", 0) for resources in reserved.values())

    ray.get(coordinator.request_resources.remote("training", [{"CPU": 1}] * 3, 600))
    assert num_reserved() == 2
    with make_node():
        assert num_reserved() == 2
        look_anew()
        assert num_reserved() == 3


def test_without_a_coordinator_there_is_nothing_to_look_for(ray_cluster):
    from jobs.training.coordinator import look_anew  # noqa: PLC0415 (imports Ray Train)

    end_coordinator()
    look_anew()


def test_room_is_on_one_node_with_its_labels(ray_cluster, make_node):
    assert not has_room({"CPU": 3}, {})
    with make_node("--labels=zone=mars"):
        await_true(lambda: has_room({"CPU": 1}, {"zone": "mars"}))  # what is free of a node is known a moment later
        assert not has_room({"CPU": 3}, {})  # two on one, one on the other
        assert not has_room({"CPU": 2}, {"zone": "mars"})
        assert not has_room({"CPU": 1}, {"zone": "venus"})
