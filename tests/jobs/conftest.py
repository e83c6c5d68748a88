"""A town small enough to train on within a test, on disk and in shards."""

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.config import load
from pipeline.synthetic.write import TownConfig, write_town

TINY = [
    "preprocess.ground_size_px=[32, 176]",
    "preprocess.aerial_size_px=[64, 64]",
    "model.backbone.blocks=[1, 1, 1]",
    "model.backbone.width=0.125",
    "model.backbone.dropout=0.2",
    "model.head.channels=4",
    "train.batch_size=4",
    "train.evaluate_every=1",
    "data.num_threads=1",
]


NO_PICTURES = "tracking.pictures=false"  # they take longer than these trainings


@pytest.fixture(scope="session")
def town(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("town")
    write_town(out, config=TownConfig(num_pairs=16, seed=3), workers=1)
    return out


@pytest.fixture(scope="session")
def make_manifest(tmp_path_factory) -> Callable[[Path], str]:
    """Shards of a raw dataset, written without Ray by the functions that Ray's tasks call."""

    def make(root: Path) -> str:
        from pipeline.build import BuildOptions, build_shards  # noqa: PLC0415 (imports ray)
        from pipeline.plan import Cut  # noqa: PLC0415
        from pipeline.runner import Here  # noqa: PLC0415

        options = BuildOptions(cut=Cut(pairs_per_shard=8))
        return build_shards(root, str(tmp_path_factory.mktemp("store")), options, runner=Here()).manifest

    return make


@pytest.fixture(scope="session")
def manifest_uri(town, make_manifest) -> str:
    """The town in shards."""
    return make_manifest(town)


@pytest.fixture(scope="session")
def tracking_uri(tmp_path_factory, mlflow_schema) -> str:
    """One MLflow file for all tests."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    shutil.copyfile(mlflow_schema, file)
    return f"sqlite:///{file}"


@pytest.fixture
def tiny(manifest_uri, tracking_uri, tmp_path):
    """Make the configuration of a training of seconds in this test's folder, with further overrides."""

    def configure(*overrides: str):
        places = [f"data.manifest={manifest_uri}", f"output={tmp_path}/runs", f"tracking.uri={tracking_uri}"]
        return load("town", [*places, *TINY, NO_PICTURES, "train.workers=1", *overrides])

    return configure


@pytest.fixture
def make_node(ray_cluster, tmp_path):
    """Give Ray a second node with one CPU for a while; further options are those of `ray start`."""
    ray = pytest.importorskip("ray")

    def alive() -> set[str]:
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    @contextlib.contextmanager
    def node(*options: str) -> Iterator[str]:
        before, log = alive(), tmp_path / "node.log"
        address = f"--address={ray.get_runtime_context().gcs_address}"
        command = [Path(sys.executable).with_name("ray"), "start", "--num-cpus=1", "--block", "--disable-usage-stats"]

        def begin() -> subprocess.Popen:
            with log.open("ab") as output:
                return subprocess.Popen([*command, address, *options], stdout=output, stderr=output)

        process = begin()
        try:
            deadline = time.monotonic() + 600
            while not alive() - before:
                assert time.monotonic() < deadline, log.read_text()
                if process.poll() is not None:  # on a busy machine Ray's parts miss deadlines of their own
                    process = begin()
                time.sleep(0.1)
            (node_id,) = alive() - before
            yield node_id
        finally:
            process.terminate()
            process.wait()
            while alive() - before:  # others count nodes
                time.sleep(0.1)

    return node
