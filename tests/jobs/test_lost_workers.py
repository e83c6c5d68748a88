"""What is said of workers that are lost, and by which interface workers meet."""

import socket

import pytest

from cvft.errors import ConfigError
from jobs.config import load

ray = pytest.importorskip("ray")

from ray.core.generated.common_pb2 import ActorDiedErrorContext  # noqa: E402 (needs ray)
from ray.exceptions import ActorDiedError  # noqa: E402
from ray.train import ControllerError, WorkerGroupError  # noqa: E402
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError  # noqa: E402

from jobs.training.lost_workers import NotMetError, describe_failures, is_loss  # noqa: E402
from jobs.training.process_group import interface_of  # noqa: E402

NODE_DIED = (
    "The actor died because its node has died. Node Id: d08cf58840\n"
    "\tthe actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats"
)


def lost(message):
    context = ActorDiedErrorContext(
        class_name="RayTrainWorker", actor_id=bytes(16), pid=7, node_ip_address="10.77.0.11", error_message=message
    )
    return WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: ...", ActorDiedError(context))


def test_the_interface_is_that_of_the_address():
    assert interface_of("127.0.0.1") in {name for _, name in socket.if_nameindex()}
    assert interface_of("203.0.113.7") is None  # TEST-NET-3: nobody's


def test_a_lost_node_a_lost_process_and_an_error_are_told_apart_in_one_line():
    errors = {1: lost(NODE_DIED), 0: RuntimeError("[...] gloo/transport/tcp/pair.cc: Connection reset by peer\nmore")}
    said = describe_failures(errors)
    assert said == (
        "rank 0 met RuntimeError: [...] gloo/transport/tcp/pair.cc: Connection reset by peer, rank 1 was lost on "
        "10.77.0.11: its node does not answer, or is gone (health check failed due to missing too many heartbeats)"
    )
    assert describe_failures({2: lost("Worker unexpectedly exits with a connection error code 2.")}) == (
        "rank 2 was lost on 10.77.0.11: its process ended"
    )


def test_a_worker_that_hangs_is_told_of_by_those_who_waited():
    timeout = (
        "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 12000ms for recv"
    )
    assert describe_failures({0: RuntimeError(f"{timeout} operation to complete")}) == (
        "rank 0 waited 12 s for another worker, which hangs or is out of reach (train.collective_timeout_s)"
    )


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ({0: RuntimeError("gloo: Timed out waiting 5000ms for recv operation to complete")}, True),
        ({0: ValueError("of its own"), 1: lost(NODE_DIED)}, True),
        ({0: RuntimeError("of its own"), 1: RuntimeError("of its own")}, False),
    ],
)
def test_only_what_was_lost_is_a_loss(failures, expected):
    assert is_loss(WorkerGroupError("", failures)) is expected
    assert is_loss(NotMetError("", failures))
    assert not is_loss(ControllerError(next(iter(failures.values()))))


def test_workers_wait_longer_for_each_other_than_one_for_the_store():
    least = ["data.manifest=m", "name=n", "train.store_patience_s=60"]
    with pytest.raises(ConfigError, match="collective_timeout_s: 60 must exceed store_patience_s=60"):
        load("town", [*least, "train.workers=[1, 2]", "train.collective_timeout_s=60"])
    load("town", [*least, "train.workers=1", "train.collective_timeout_s=60"])
