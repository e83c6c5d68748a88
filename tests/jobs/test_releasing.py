"""A training on Ray holds no node longer than it lasts; on a head with the real autoscaler and nodes of processes."""

import subprocess
import sys
import time

import pytest
from mlflow import MlflowClient

from tests.bench.cluster_watch import Watch
from tests.jobs import clusters
from tests.jobs.clusters import ROOT
from tests.jobs.conftest import NO_PICTURES, TINY

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.cluster]

COORDINATOR = """
import ray
from jobs.training.coordinator import coordinator_on_head
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

@ray.remote(num_cpus=1, label_selector={"ray.io/node-group": "cpu"})
def train():  # what the driver does, then Ray Train's controller beside it
    coordinator_on_head()
    ray.get(get_or_create_autoscaling_coordinator().get_reserved_resources.remote("anybody"))

ray.init(log_to_driver=False)
ray.get(train.remote())
"""


@pytest.fixture(scope="module")
def environment():
    """A client of a cluster of our own."""
    # Ray kills a job that was told to stop after 3 s where nothing is said, which a busy machine may need.
    with clusters.cluster(RAY_AUTH_MODE="disabled", RAY_JOB_STOP_WAIT_TIME_S="30") as ours:
        yield ours.client


@pytest.fixture
def watch(environment):
    return Watch(environment["RAY_PORT"], {"cpu", "train"})


@pytest.fixture
def begin(environment):
    with clusters.submitters(environment, "--working-dir", "none") as begin:
        yield begin


def assert_all_is_given_back(watch, environment):
    watch.wait_for_none(60)  # idle nodes go after 15 s, and a request that nobody takes back holds them for 200 s
    held = watch.held(environment["RAY_API_SERVER_ADDRESS"])
    assert held.pop("of Ray itself") == ["_AutoscalingCoordinatorActor"]
    assert not any(held.values()), held


def test_a_driver_on_a_node_leaves_nothing_of_ray_train_there(environment, watch):
    actors = {"RAY_ADDRESS": f"127.0.0.1:{environment['RAY_PORT']}"}
    subprocess.run([sys.executable, "-c", COORDINATOR], env=environment | actors, cwd=ROOT, check=True)
    assert_all_is_given_back(watch, environment)


def test_a_training_that_is_stopped_gives_its_nodes_back(
    begin, environment, watch, manifest_uri, tracking_uri, tmp_path
):
    places = [f"data.manifest={manifest_uri}", f"output={tmp_path}", f"tracking.uri={tracking_uri}", NO_PICTURES]
    workers = ["train.workers=2", "train.num_epochs=1000", "train.node_labels={ray.io/node-group: train}"]
    job = begin("--name", "long", "train", "--config", "town", "name=long", *places, *TINY, *workers)
    while not list(tmp_path.glob("long/checkpoints/*/checkpoint.json")):
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.2)
    assert watch.demands()["request_resources"] == 2  # Ray Train's own
    assert begin("--stop", "long").end()[0] == 0
    code, _, err = job.end()
    assert code == 1
    assert "cvft train: interrupted; the same command continues where it can" in err
    client = MlflowClient(tracking_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    [run] = client.search_runs(experiments, "attributes.run_name = 'long'")
    assert run.info.status == "KILLED"
    assert_all_is_given_back(watch, environment)
