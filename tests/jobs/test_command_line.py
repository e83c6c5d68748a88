"""What scripts rely on: arguments, the JSON in the last line of stdout, exit codes, one line for what is wrong."""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from cvft.checkpoint import load_model
from cvft.preprocess import Preprocess
from jobs import cli, demo, entry, evaluate, import_official, shard, synthesize, train, validate
from jobs.config import load
from tests.jobs.conftest import NO_PICTURES, TINY

# MLflow 3.17 uses an option that SQLAlchemy 2.1 wants to drop; it is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

RECALLS = dict.fromkeys(("recall_at_1", "recall_at_5", "recall_at_10", "recall_at_1_percent", "chance"), float)
PROMISED = {
    "synthesize": {"num_pairs": dict, "num_written": int, "fingerprint": str, "seconds": float},
    "validate": {"layout": str, "ok": bool, "pairs": dict, "problems": dict},
    "shard": {"manifest": str, "digest": str, "pairs": int, "shards": int, "bytes": int, "seconds": float},
    "train": {"run_id": str, "checkpoint": str, "step": int, "recall_at_1": float},
    "evaluate": {**RECALLS, "num_queries": int, "num_references": int},
    "demo": {**RECALLS, "report": str, "model": str, "version": int, "seconds": float},
}
LOG_LINE = re.compile(r"(\d{4}.\d\d.\d\d )?\d\d:\d\d:\d\d")
STAGES = {"synthesize", "shard", "train", "register"}  # besides those of the report


def _parse(job, stdout):
    """Read the last line of stdout, strictly (no NaN), and hold it against what the job promises."""
    result = json.loads(stdout.splitlines()[-1], parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    types = {key: type(result[key]) for key in PROMISED[job.name]}
    assert types == PROMISED[job.name]
    return result


def _succeed(job, *arguments):
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        code = entry.main(job, [str(argument) for argument in arguments])
    assert code == 0
    return _parse(job, stdout.getvalue())


def _fail(job, capfd, *arguments):
    """Run a job that must fail with exit code 2 and one line on stderr; return stdout and the line."""
    capfd.readouterr()
    assert entry.main(job, [str(argument) for argument in arguments]) == 2
    out, err = capfd.readouterr()
    return out, _the_error(job, err)


def _refuse(job, capfd, *arguments, saying):
    """Run a job that must fail without a result, with a line that holds all these words."""
    out, line = _fail(job, capfd, *arguments)
    assert out == ""
    assert [word for word in saying if word not in line] == [], line


def _the_error(job, stderr):
    (line,) = (line for line in stderr.splitlines() if not LOG_LINE.match(line))
    assert line.startswith(f"cvft {job.name}: error: ")
    return line


def _an_image(town, folder="streetview/panos"):
    return sorted((town / folder).glob("*.jpg"))[3]


def _truncate(image):
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])


@pytest.fixture
def damaged(town, tmp_path):
    """The town with one panorama whose download broke off."""
    copy = tmp_path / "damaged"
    shutil.copytree(town, copy)
    _truncate(_an_image(copy))
    return copy


@pytest.fixture(scope="module")
def trained(manifest_uri, tracking_uri, tmp_path_factory):
    """The result of `cvft train` for one epoch."""
    places = [f"data.manifest={manifest_uri}", f"tracking.uri={tracking_uri}"]
    output = tmp_path_factory.mktemp("command_line")
    settings = [*places, f"output={output}", *TINY, NO_PICTURES, "train.workers=1", "train.num_epochs=1"]
    return _succeed(train.JOB, "--config", "town", *settings)


def test_synthesize_tells_which_town_there_is_and_does_nothing_twice(town, capfd):
    place = ["--out", town, "--pairs", 16, "--workers", 1]
    made = _succeed(synthesize.JOB, *place, "--seed", 3)
    assert (made["num_pairs"], made["num_written"]) == ({"train": 12, "val": 4}, 0)
    _refuse(synthesize.JOB, capfd, *place, "--seed", 4, saying=["holds another town"])


@pytest.mark.parametrize("layout", ["auto", "cvusa"])
def test_validate_counts_the_usable_pairs_of_each_split(town, layout):
    found = _succeed(validate.JOB, "--root", town, "--layout", layout)
    expected = {"layout": "cvusa", "ok": True, "pairs": {"train": 12, "val": 4}, "problems": {}}
    assert expected.items() <= found.items()


@pytest.mark.parametrize(
    ("damage", "kind"),
    [(_truncate, "truncated"), (Path.unlink, "missing_ground"), (lambda image: image.write_bytes(b""), "empty_file")],
    ids=["truncated", "missing", "empty"],
)
def test_validate_of_an_unusable_image_is_one_line_and_still_the_result(town, tmp_path, capfd, caplog, damage, kind):
    shutil.copytree(town, tmp_path / "town")
    image = _an_image(tmp_path / "town")
    damage(image)
    with caplog.at_level("INFO", logger="cvft"):
        out, line = _fail(validate.JOB, capfd, "--root", tmp_path / "town")
    found = _parse(validate.JOB, out)
    assert (found["ok"], sum(found["pairs"].values()), found["problems"]) == (False, 15, {kind: 1})
    assert image.name in caplog.text + line


def test_python_m_and_cvft_are_the_same(damaged, capfd):
    arguments = ["--root", str(damaged)]
    command = [sys.executable, "-m", "jobs.validate", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(entry.__file__).parents[1])
    capfd.readouterr()
    assert cli.main(["validate", *arguments]) == done.returncode == 2
    out, err = capfd.readouterr()
    assert out == done.stdout
    # A table for people stands before the line.
    assert done.stderr.splitlines()[-1] == err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("cvft validate: error: ")
    assert _parse(validate.JOB, out)["ok"] is False


@pytest.mark.ray
@pytest.mark.parametrize("job", [validate.JOB, shard.JOB], ids=lambda job: job.name)
def test_a_root_that_is_not_there_is_named(job, ray_cluster, tmp_path, capfd):
    store = ["--store", tmp_path / "store"] if job is shard.JOB else []
    for root in (tmp_path / "nowhere", tmp_path / "pairs.csv"):
        _refuse(job, capfd, "--root", root, *store, saying=[str(root)])
    assert not (tmp_path / "store").exists()


@pytest.mark.ray
def test_shard_started_again_writes_nothing_and_names_the_same_manifest(ray_cluster, town, tmp_path, monkeypatch):
    where = ["--store", tmp_path / "store", "--pairs-per-shard", 8]
    made = _succeed(shard.JOB, "--root", town, *where)
    assert (made["layout"], made["pairs"], made["shards"], made["shards_written"]) == ("cvusa", 16, 3, 3)
    assert made["bytes"] == sum(tar.stat().st_size for tar in (tmp_path / "store").rglob("*.tar"))
    assert Path(made["manifest"]).is_file()
    monkeypatch.chdir(town.parent)
    again = _succeed(shard.JOB, "--root", town.name, *where)
    changes = {"kept": 16, "new": 0, "rewritten": 0, "dropped": 0}
    assert again == {**made, "shards_written": 0, "changes": changes, "seconds": again["seconds"]}


@pytest.mark.ray
def test_shard_refuses_an_unusable_pair_or_leaves_it_out_when_told(ray_cluster, damaged, tmp_path, capfd, caplog):
    where = ["--root", damaged, "--store", tmp_path / "store"]
    _refuse(shard.JOB, capfd, *where, saying=["--skip-unusable"])
    assert not (tmp_path / "store/dataset.json").exists()
    assert not (tmp_path / "store/manifests").exists()
    made = _succeed(shard.JOB, *where, "--skip-unusable")
    assert (made["pairs"], made["left_out"], made["problems"]) == (15, 1, {"truncated": 1})
    assert _an_image(damaged).name in caplog.text


@pytest.mark.parametrize("above", range(3), ids=["manifests", "store", "above"])
def test_evaluate_measures_what_training_did_wherever_it_is_called(trained, manifest_uri, monkeypatch, above):
    folder = Path(manifest_uri).parents[above]
    monkeypatch.chdir(folder)
    manifest = Path(manifest_uri).relative_to(folder)
    measured = _succeed(evaluate.JOB, "--checkpoint", trained["checkpoint"], "--manifest", manifest)
    assert {key: measured[key] for key in RECALLS} == {key: trained[key] for key in RECALLS}
    assert (measured["num_queries"], measured["chance"], measured["split"]) == (4, 0.25, "val")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--split": "tset"}, ["'tset'", "train", "val"]),
        ({"--checkpoint": "runs/none"}, ["runs/none", "checkpoint"]),
        ({"--manifest": "none.parquet"}, ["none.parquet", "manifest"]),
        ({"": "preprocess.chanel_order=bgr"}, ["preprocess.chanel_order", "channel_order"]),
        ({"": "train.seed=1"}, ["train", "preprocess"]),
    ],
    ids=["split", "checkpoint", "manifest", "key", "section"],
)
def test_evaluate_names_what_is_wrong(trained, manifest_uri, capfd, change, said):
    given = {"--checkpoint": trained["checkpoint"], "--manifest": manifest_uri, **change}
    _refuse(evaluate.JOB, capfd, *(word for pair in given.items() for word in pair if word), saying=said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "town", "train.loss.gama=12"], ["train.loss.gama", "gamma"]),
        (["--config", "town", "train.num_epochs=many"], ["train.num_epochs", "many"]),
        (["--config", "twon"], ["twon", "town", "official"]),
        (["--config", "none.yaml"], ["none.yaml"]),
        (["--config", "town", "data.manifest=none.parquet"], ["none.parquet"]),
    ],
    ids=["key", "type", "preset", "file", "manifest"],
)
def test_train_names_what_is_wrong_and_writes_nothing(tmp_path, monkeypatch, capfd, arguments, said):
    monkeypatch.chdir(tmp_path)
    _refuse(train.JOB, capfd, *arguments, saying=said)
    assert list(tmp_path.iterdir()) == []


def test_an_absent_extra_is_named_with_how_to_install_it(tmp_path, capfd):
    if importlib.util.find_spec("tensorflow") is not None:
        pytest.skip("TensorFlow is installed")
    where = ["--checkpoint", tmp_path / "model.ckpt", "--out", tmp_path / "out"]
    _refuse(import_official.JOB, capfd, *where, saying=["cvft[tensorflow]"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", cli.SUMMARIES)
def test_the_example_in_a_jobs_help_is_accepted_by_the_job(name):
    job = importlib.import_module(f"jobs.{name}").JOB
    words = shlex.split(re.sub(r"\$\([^()]*\)", "dummy", job.example))
    assert words[:2] == ["cvft", job.name] == ["cvft", name]
    parser = argparse.ArgumentParser(exit_on_error=False)
    job.add_arguments(parser)
    arguments = parser.parse_args(words[2:])
    load(getattr(arguments, "config", "town"), getattr(arguments, "overrides", []))


@pytest.fixture(scope="module")
def run_demo(tmp_path_factory):
    settings = ["--pairs", 24, *TINY, "train.num_epochs=1", "train.workers=1"]
    out = tmp_path_factory.mktemp("demo") / "out"
    return lambda: _succeed(demo.JOB, "--out", out, *settings)


@pytest.fixture(scope="module")
def shown(ray_cluster, run_demo):
    """The result of a demo from nothing."""
    return run_demo()


def test_demo_refuses_an_unknown_key_before_it_writes_anything(tmp_path, capfd):
    _refuse(demo.JOB, capfd, "--out", tmp_path / "demo", "train.num_epoch=2", saying=["train.num_epochs"])
    assert not (tmp_path / "demo").exists()


@pytest.mark.ray
def test_demos_report_is_there_and_its_model_loads_from_its_registry(shown, monkeypatch):
    assert "<html" in Path(shown["report"]).read_text(encoding="utf-8")
    assert (shown["version"], shown["chance"]) == (1, pytest.approx(1 / 6))
    # Not by MLflow's setters: what they set outlasts the test.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path(shown['report']).parents[1]}/mlflow.db")
    registered = mlflow.pyfunc.load_model(shown["model"])
    random = np.random.default_rng(0)
    sizes = {"ground": (2, 32, 176, 3), "aerial": (2, 64, 64, 3)}
    pixels = {view: random.integers(0, 256, size, dtype=np.uint8) for view, size in sizes.items()}
    model, info = load_model(Path(shown["checkpoint"]))
    preprocess = Preprocess(info.preprocess)
    with torch.no_grad():
        expected = model.eval()(*(preprocess(torch.from_numpy(image)) for image in pixels.values()))
    predicted = registered.predict(pixels)
    for view, descriptors in zip(sizes, expected, strict=True):
        np.testing.assert_allclose(predicted[view], descriptors, rtol=0, atol=1e-6)


@pytest.mark.ray
@pytest.mark.parametrize("is_report_lost", [False, True], ids=["whole", "report lost"])
def test_demo_again_does_only_what_is_missing(shown, run_demo, caplog, is_report_lost):
    if is_report_lost:
        Path(shown["report"]).unlink()
    with caplog.at_level("INFO", logger="cvft"):
        again = run_demo()
    messages = [record.getMessage() for record in caplog.records]
    begun = {message.partition(":")[0] for message in messages if message.endswith(": begins")}
    kept = {message.partition(":")[0] for message in messages if message.endswith(": up to date")}
    assert kept >= STAGES
    assert len(begun) == is_report_lost
    assert any("report" in stage for stage in (begun if is_report_lost else kept))
    assert again == {**shown, "seconds": again["seconds"]}
    assert Path(again["report"]).is_file()
