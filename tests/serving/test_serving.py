"""A registered model where nothing is installed but what it asks for: `make test-serving`.

This process has the project and makes the model; the one that serves it is another Python, named by the environment.
"""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from cvft.checkpoint import CheckpointInfo
from cvft.config import BackboneConfig, HeadConfig, ModelConfig, PreprocessConfig
from cvft.model import CrossViewModel
from cvft.preprocess import Preprocess
from cvft.snapshot import save_checkpoint
from pipeline.tracking.registry import register_model
from pipeline.tracking.runs import open_run
from pipeline.tracking.server import prepare
from tests.ports import free_ports

PYTHON = os.environ.get("CVFT_SERVING_PYTHON", "")
pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(not PYTHON, reason="runs in an environment of the model's own: make test-serving"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
]
PREPROCESS = PreprocessConfig(ground_size_px=(32, 96), aerial_size_px=(64, 64))
MODEL = ModelConfig(
    backbone=BackboneConfig(blocks=(1, 1, 1), width=0.125, num_frozen_blocks=0, dropout=0.0),
    head=HeadConfig(channels=4, grid=(8, 8)),
)


@pytest.fixture(scope="module")
def served(tmp_path_factory, mlflow_schema):
    """The folder of a registered model, images, and the descriptors that this project computes of them."""
    folder = tmp_path_factory.mktemp("serving")
    shutil.copyfile(mlflow_schema, folder / "mlflow.db")
    tracking = prepare(f"sqlite:///{folder}/mlflow.db", experiment="town")
    torch.manual_seed(0)
    model = CrossViewModel(MODEL, PREPROCESS).eval()
    save_checkpoint(folder / "checkpoint", model=model, info=CheckpointInfo(model=MODEL, preprocess=PREPROCESS))
    run = open_run(tracking, name="first", identity="first", config={})
    version = register_model(run, folder / "checkpoint", card="# A card")
    random, preprocess = np.random.default_rng(0), Preprocess(PREPROCESS)
    sizes = {"ground": (3, 32, 96, 3), "aerial": (2, 64, 64, 3)}
    pixels = {view: random.integers(0, 256, size, dtype=np.uint8) for view, size in sizes.items()}
    with torch.no_grad():
        embed = {"ground": model.embed_ground, "aerial": model.embed_aerial}
        expected = {view: embed[view](preprocess(torch.from_numpy(image))).numpy() for view, image in pixels.items()}
    source = run.client.get_model_version("cvft", str(version)).source
    return Path(source.removeprefix("file://")), pixels, expected


def _environment(**more):
    """Return what the other Python is told; nothing of this project is on its way."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHONPATH", "MLFLOW_"))}
    # MLflow starts its server by name: the environment's own programs come first, as when it is activated.
    path = f"{Path(PYTHON).parent}:{clean['PATH']}"
    return {**clean, "PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true", **more}


def _run(*command, folder, **environment):
    """Run a command of that Python in an empty folder."""
    return subprocess.run(
        [PYTHON, *map(str, command)],
        cwd=folder,
        env=_environment(**environment),
        check=True,
        timeout=300,
        capture_output=True,
        text=True,
    )


def _as_json(pixels):
    return json.dumps({"inputs": {view: image.tolist() for view, image in pixels.items()}})


def _assert_same(predicted, expected):
    for view, descriptors in expected.items():
        np.testing.assert_allclose(np.asarray(predicted[view]), descriptors, rtol=0, atol=1e-6)


def test_the_environment_is_what_the_model_asks_for_and_has_nothing_of_this_project(served, tmp_path):
    asked = (served[0] / "requirements.txt").read_text(encoding="utf-8").split()
    installed = _run("-m", "pip", "freeze", folder=tmp_path).stdout.split()
    # A build for CPUs names itself torch==2.13.0+cpu.
    assert set(asked) <= {package.partition("+")[0] for package in installed}
    code = (
        "import importlib.util as u; print([n for n in ('cvft', 'pipeline', 'jobs', 'ray', 'cv2') if u.find_spec(n)])"
    )
    assert _run("-c", code, folder=tmp_path).stdout.strip() == "[]"


def test_pyfunc_gives_the_descriptors_that_this_project_gives(served, tmp_path):
    model, pixels, expected = served
    np.savez(tmp_path / "in.npz", **pixels)
    code = (
        "import sys, numpy as np, mlflow; model = mlflow.pyfunc.load_model(sys.argv[1]);"
        "np.savez('out.npz', **model.predict(dict(np.load('in.npz'))))"
    )
    _run("-c", code, model, folder=tmp_path)
    _assert_same(np.load(tmp_path / "out.npz"), expected)


def test_torch_and_the_models_own_package_give_them_without_mlflow(served, tmp_path):
    model, pixels, expected = served
    np.savez(tmp_path / "in.npz", **pixels)
    code = """
import pathlib, sys
import numpy as np, torch
from cvft.checkpoint import load_model
from cvft.preprocess import Preprocess
model, info = load_model(pathlib.Path(sys.argv[1]))
preprocess = Preprocess(info.preprocess)
with torch.no_grad():
    ground, aerial = (preprocess(torch.from_numpy(np.load("in.npz")[view])) for view in ("ground", "aerial"))
    np.savez("out.npz", ground=model.embed_ground(ground), aerial=model.embed_aerial(aerial))
assert "mlflow" not in sys.modules
"""
    _run("-c", code, model / "artifacts/checkpoint", folder=tmp_path, PYTHONPATH=str(model / "code"))
    _assert_same(np.load(tmp_path / "out.npz"), expected)


def test_mlflow_models_predict_gives_them_from_json(served, tmp_path):
    model, pixels, expected = served
    (tmp_path / "in.json").write_text(_as_json(pixels), encoding="utf-8")
    command = ["-m", "mlflow", "models", "predict", "--model-uri", model, "--env-manager", "local"]
    _run(*command, "--input-path", "in.json", "--content-type", "json", "--output-path", "out.json", folder=tmp_path)
    _assert_same(json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["predictions"], expected)


def test_mlflow_models_serve_gives_them_over_http(served, tmp_path):
    model, pixels, expected = served
    (port,) = free_ports(1)
    command = [PYTHON, "-m", "mlflow", "models", "serve", "--model-uri", str(model), "--env-manager", "local"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=tmp_path,
            env=_environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,  # it starts others, which end with it
        )
        try:
            deadline = time.monotonic() + 600
            while not _answers(port):
                assert server.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
                assert time.monotonic() < deadline, (tmp_path / "log").read_text(encoding="utf-8")
                time.sleep(0.2)
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations",
                data=_as_json(pixels).encode(),
                headers={"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                predicted = json.load(answer)["predictions"]
        finally:
            os.killpg(server.pid, 15)
            server.wait(timeout=60)
    _assert_same(predicted, expected)


def _answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
