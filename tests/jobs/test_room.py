"""Room on a cluster without an autoscaler: two CPUs, and no more ever. With one, see test_submit.py."""

import threading
import time

import pytest

from cvft.errors import ClusterError, ConfigError
from jobs import cluster, room
from jobs.node_labels import parse_labels

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    monkeypatch.setattr(room, "_POLL_S", 0.2)
    monkeypatch.setattr(room, "_GRACE_S", 0.0)


def test_room_that_is_there_is_found_and_given_back(ray_cluster):
    for _ in range(3):
        room.await_room(2, {"CPU": 1}, what="train.workers=2")


@pytest.mark.parametrize(
    ("number", "resources", "labels", "wanted"),
    [
        (3, {"CPU": 1}, {}, r"3 x 1 CPU"),
        (1, {"CPU": 1, "GPU": 1}, {}, r"1 x 1 CPU \+ 1 GPU"),
        (1, {"CPU": 1}, {"ray.io/node-group": "gpu"}, r"1 x 1 CPU on ray\.io/node-group=gpu"),
    ],
)
def test_room_that_never_comes_is_refused_at_once(ray_cluster, number, resources, labels, wanted):
    message = (
        rf"^train\.workers: {wanted} cannot be had: the cluster has .*of 2 CPU on 1 node\b.*"
        r", and there is no autoscaler to add any; ask for less"
    )
    with pytest.raises(ClusterError, match=message):
        room.await_room(number, resources, what="train.workers", labels=labels)


class Holder:
    def is_there(self):
        return True


def test_room_that_others_have_is_waited_for_in_words(ray_cluster, caplog):
    holder = ray.remote(num_cpus=2)(Holder).remote()
    assert ray.get(holder.is_there.remote())
    waiting = threading.Thread(target=room.await_room, args=[1, {"CPU": 1}], kwargs={"what": "evaluate"}, daemon=True)
    with caplog.at_level("INFO"):
        waiting.start()
        deadline = time.monotonic() + 120
        told = "waiting for 1 x 1 CPU (evaluate): 0 CPU free of 2 CPU on 1 node; there is no autoscaler"
        while told not in caplog.text:  # said again each ten seconds: what nodes report may be a moment old
            assert time.monotonic() < deadline, caplog.text
            time.sleep(0.1)
        ray.kill(holder)
        waiting.join()
    assert "1 x 1 CPU found after" in caplog.text


def test_without_a_cluster_a_function_is_called_here_and_labels_are_refused(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster.on_a_node(type, 1, use_gpu=False, labels={}, what="--node-label") is int
    with pytest.raises(ConfigError, match="--node-label: there are no nodes to choose from"):
        cluster.on_a_node(type, 1, use_gpu=False, labels={"a": "b"}, what="--node-label")


def test_labels_are_plain_words():
    assert parse_labels(["a=b", "ray.io/node-group=gpu"], option="--label") == {"a": "b", "ray.io/node-group": "gpu"}
    for text in ("a", "=b", "a=", "a=!b", "a=in(b,c)"):
        with pytest.raises(ConfigError, match="--label"):
            parse_labels([text], option="--label")


def _status(*nodes, has_autoscaler=True):
    """What a cluster says of nodes of one CPU: each given by its group and how much of the CPU is free."""
    found = [
        {"NodeID": str(number), "Resources": {"CPU": 1.0}, "Labels": {"ray.io/node-group": group}}
        for number, (group, _) in enumerate(nodes)
    ]
    free = {str(number): {"CPU": amount} for number, (_, amount) in enumerate(nodes)}
    return room._Status(found, free, has_autoscaler, frozenset(), {})


def test_a_full_cluster_is_waited_for_and_one_that_is_too_small_is_not():
    busy, idle = ("cpu", 0.0), ("cpu", 1.0)

    def others_hold(number, *nodes, **options):
        return room._others_hold(room._Wanted(number, {"CPU": 1}, {}, "shard"), _status(*nodes, **options))

    assert others_hold(1, busy, busy)
    assert others_hold(5, busy, idle)  # more may come where others have gone
    assert not others_hold(5, idle, idle)
    assert not others_hold(5)
    assert not others_hold(5, busy, busy, has_autoscaler=False)
    gpus = room._Wanted(1, {"CPU": 1}, {"ray.io/node-group": "gpu"}, "train")
    assert not room._others_hold(gpus, _status(busy, idle))
