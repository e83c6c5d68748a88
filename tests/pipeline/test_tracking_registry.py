import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from cvft.checkpoint import CheckpointInfo
from cvft.config import BackboneConfig, HeadConfig, ModelConfig, OptimizerConfig, PreprocessConfig
from cvft.errors import CheckpointError
from cvft.model import CrossViewModel
from cvft.optim import build_optimizer
from cvft.preprocess import Preprocess
from cvft.snapshot import save_checkpoint
from pipeline.tracking.registry import register_model
from pipeline.tracking.runs import open_run
from pipeline.tracking.server import prepare

# MLflow 3.17 uses an option that SQLAlchemy 2.1 wants to drop; it is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

PREPROCESS = PreprocessConfig(ground_size_px=(16, 48), aerial_size_px=(32, 32))
MODEL = ModelConfig(
    backbone=BackboneConfig(blocks=(1, 1), width=0.125, num_frozen_blocks=0, dropout=0.0),
    head=HeadConfig(channels=4, grid=(8, 8)),
)


def checkpoint(directory, seed):
    torch.manual_seed(seed)
    model = CrossViewModel(MODEL, PREPROCESS).eval()
    info = CheckpointInfo(model=MODEL, preprocess=PREPROCESS, step=7, manifest_digest="feed")
    save_checkpoint(directory, model=model, info=info, optimizer=build_optimizer(model, OptimizerConfig()))
    return model


def images(num_ground, num_aerial):
    rng = np.random.default_rng(0)
    return {
        "ground": rng.integers(0, 256, (num_ground, 16, 48, 3), dtype=np.uint8),
        "aerial": rng.integers(0, 256, (num_aerial, 32, 32, 3), dtype=np.uint8),
    }


def embed(model, pixels):
    preprocess = Preprocess(PREPROCESS)
    with torch.no_grad():
        ground, aerial = model(*(preprocess(torch.from_numpy(pixels[view])) for view in ("ground", "aerial")))
    return {"ground": ground.numpy(), "aerial": aerial.numpy()}


@pytest.fixture(scope="module")
def town(tmp_path_factory, mlflow_schema):
    """A place with one registered version, its checkpoint and its model."""
    folder = tmp_path_factory.mktemp("registry")
    shutil.copyfile(mlflow_schema, folder / "mlflow.db")
    tracking = prepare(f"sqlite:///{folder}/mlflow.db", experiment="town")
    run = open_run(tracking, name="first", identity="first", config={})
    model = checkpoint(folder / "checkpoint", seed=0)
    version = register_model(
        run,
        folder / "checkpoint",
        metrics={"recall_at_1": 0.5},
        description="Small.",
        tags={"commit": "abc"},
        card="# A card",
    )
    assert version == 1
    return folder, run, model


@pytest.fixture
def mlflow_at(town, monkeypatch):
    # Not by MLflow's setters: what they set outlasts the test.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", town[1].uri)


@pytest.mark.usefixtures("mlflow_at")
def test_a_registered_model_predicts_the_models_own_descriptors(town):
    loaded = mlflow.pyfunc.load_model("models:/cvft@candidate")
    pixels = images(3, 3)
    expected = embed(town[2], pixels)
    predicted = loaded.predict(pixels)
    for view in ("ground", "aerial"):
        assert predicted[view].dtype == np.float32
        np.testing.assert_allclose(predicted[view], expected[view], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("mlflow_at")
def test_one_view_is_embedded_alone_by_giving_none_of_the_other(town):
    loaded = mlflow.pyfunc.load_model("models:/cvft@candidate")
    pixels = images(2, 0)
    predicted = loaded.predict(pixels)
    assert predicted["aerial"].shape == (0, 256)
    np.testing.assert_allclose(predicted["ground"], embed(town[2], images(2, 2))["ground"], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("mlflow_at", "town")
@pytest.mark.parametrize(
    ("view", "wrong"),
    [("ground", np.zeros((1, 16, 40, 3), np.uint8)), ("aerial", np.zeros((1, 32, 32, 3), np.float32))],
)
def test_images_of_another_size_or_type_are_refused(view, wrong):
    loaded = mlflow.pyfunc.load_model("models:/cvft@candidate")
    with pytest.raises(mlflow.MlflowException, match=r"[Ss]hape|dtype"):
        loaded.predict({**images(1, 1), view: wrong})


def test_version_tells_where_it_comes_from_and_holds_no_pickle_and_no_optimizer(town):
    _, run, _ = town
    version = run.client.get_model_version("cvft", "1")
    assert version.run_id == run.run_id
    assert version.description == "Small."
    assert version.tags["manifest_digest"] == "feed"
    assert version.tags["commit"] == "abc"
    (logged,) = run.client.search_logged_models([run.client.get_run(run.run_id).info.experiment_id])
    assert version.source == logged.artifact_location
    assert logged.tags["mlflow.modelVersions"] == '[{"name": "cvft", "version": 1}]'
    assert {metric.key: metric.value for metric in logged.metrics} == {"recall_at_1": 0.5}
    root = logged.artifact_location.removeprefix("file://")
    names = [os.path.join(base, name) for base, _, files in os.walk(root) for name in files]
    files = {name.removeprefix(f"{root}/") for name in names}
    assert {"MLmodel", "serving.py", "code/cvft/model.py", "requirements.txt", "MODEL_CARD.md"} <= files
    assert Path(root, "MODEL_CARD.md").read_text(encoding="utf-8") == "# A card"
    assert {name for name in files if "checkpoint/" in name} == {
        f"artifacts/checkpoint/{name}" for name in ("model.safetensors", "checkpoint.json")
    }
    kinds = {"MLmodel", "registered_model_meta", "py", "safetensors", "json", "txt", "yaml", "md"}
    assert {name.rpartition(".")[2].rpartition("/")[2] for name in files} <= kinds
    pickle_magic = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
    assert not [name for name in names if Path(name).read_bytes().startswith(pickle_magic)]


def test_it_loads_where_this_project_is_not_installed(town, tmp_path):
    _, run, model = town
    location = run.client.get_model_version("cvft", "1").source
    pixels = images(1, 1)
    np.savez(tmp_path / "in.npz", **pixels)
    code = f"""
import sys
sys.path = [entry for entry in sys.path if "editable" not in entry]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
import mlflow, numpy as np
loaded = mlflow.pyfunc.load_model({location!r})
import cvft
assert cvft.__file__.startswith({location.removeprefix("file://")!r}), cvft.__file__
forbidden = {{"pipeline", "jobs", "ray"}} & set(sys.modules)
assert not forbidden, forbidden
np.savez("out.npz", **loaded.predict(dict(np.load("in.npz"))))
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment, timeout=120)
    predicted = np.load(tmp_path / "out.npz")
    for view, expected in embed(model, pixels).items():
        np.testing.assert_allclose(predicted[view], expected, rtol=0, atol=1e-6)


def test_the_same_checkpoint_is_registered_once_and_another_one_takes_the_alias(town):
    folder, run, _ = town
    assert register_model(run, folder / "checkpoint") == 1
    assert len(run.client.search_model_versions("name = 'cvft'")) == 1
    checkpoint(folder / "other", seed=1)
    assert register_model(run, folder / "other") == 2
    assert run.client.get_model_version_by_alias("cvft", "candidate").version == 2
    assert register_model(run, folder / "checkpoint", alias="other") == 1
    assert run.client.get_registered_model("cvft").aliases == {"candidate": 2, "other": 1}


def test_a_damaged_checkpoint_is_refused_and_leaves_no_version(town):
    folder, run, _ = town
    checkpoint(folder / "damaged", seed=2)
    (folder / "damaged/model.safetensors").write_bytes(b"no")
    before = len(run.client.search_model_versions("name = 'cvft'"))
    with pytest.raises(CheckpointError, match="SHA-256"):
        register_model(run, folder / "damaged")
    assert len(run.client.search_model_versions("name = 'cvft'")) == before
