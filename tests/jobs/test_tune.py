"""Searches on Ray: bad trials stopped early, failed ones on record, goes on after a kill, weights handed over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from cvft.checkpoint import read_info
from cvft.configuration import parse
from cvft.errors import ClusterError
from jobs import train, tune
from jobs.config import ExperimentConfig, load
from jobs.search.config import SearchConfig
from jobs.search.trial import trial_config
from jobs.training import worker
from pipeline.tracking.server import prepare, tracking_client
from tests.jobs.conftest import NO_PICTURES, TINY
from tests.jobs.test_shard_killed import descendants

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.cluster]

RATE = {"train.optimizer.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}


def spec_of(space, **changes) -> SearchConfig:
    return parse(SearchConfig, {"name": "small", "base": "town", "space": space, **changes})


def journal_of(out: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("trials/*/trial.json"))}


def runs_below(uri: str, parent: str) -> list:
    tracking = prepare(uri, experiment="cvft")
    found = tracking_client(uri).search_runs([tracking.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    return sorted(found, key=lambda run: run.info.run_name)


@pytest.fixture
def search(ray_cluster, manifest_uri, tracking_uri, tmp_path):
    """Do a search in this test's folder."""

    def run(spec, *overrides, out="search"):
        settings = [*TINY, NO_PICTURES, f"tracking.uri={tracking_uri}", *overrides]
        return tune.tune(spec, manifest=manifest_uri, out=str(tmp_path / out), overrides=settings)

    return run


def test_a_search_stops_the_bad_records_the_failed_and_leaves_the_best(search, tracking_uri, tmp_path, monkeypatch):
    space = {
        "train.optimizer.learning_rate": {"type": "choice", "values": [3e-3, 1e-9]},
        # More than there are pairs, which only the trial itself sees.
        "train.batch_size": {"type": "choice", "values": [4, 64], "when": {"train.optimizer.learning_rate": 3e-3}},
    }
    spec = spec_of(
        space,
        searcher={"kind": "grid"},
        scheduler={"kind": "asha", "grace_epochs": 2, "reduction_factor": 2},
        trial={"max_concurrent": 1},
    )
    settings = ["train.num_epochs=6", "tracking.pictures=true"]
    result = search(spec, *settings)
    journal = journal_of(tmp_path / "search")
    assert [item["status"] for item in journal.values()] == ["finished", "failed", "stopped"]
    assert [len(item["evaluations"]) for item in journal.values()] == [6, 0, 2]
    assert "64" in journal["trial-0001"]["reason"]
    assert result["trials"] == {"finished": 1, "failed": 1, "stopped": 1}
    runs = runs_below(tracking_uri, result["run_id"])
    assert [run.info.run_name for run in runs] == list(journal)
    assert [run.data.tags["search.status"] for run in runs] == ["finished", "failed", "stopped"]
    assert [run.info.status for run in runs] == ["FINISHED", "FAILED", "FINISHED"]
    has_pictures = [
        any(
            file.path == "report/report.html"
            for file in tracking_client(tracking_uri).list_artifacts(run.info.run_id, "report")
        )
        for run in runs
    ]
    assert has_pictures == [True, False, False]
    assert (tmp_path / "search" / "report" / "search.html").stat().st_size > 10_000

    # The best configuration is a file that `train` takes as it is, and it repeats the recall.
    best = yaml.safe_load((tmp_path / "search" / "best.yaml").read_text())
    assert (best["name"], best["train"]["optimizer"]["learning_rate"]) == ("small-best", 3e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    again = train.train(load(str(tmp_path / "search" / "best.yaml")))
    torch.set_num_threads(threads)
    assert again["recall_at_1"] == result["recall_at_1"]
    assert again["loss"] in [numbers["loss"] for numbers in journal["trial-0000"]["evaluations"]]

    # Given again it only reads, and starts no Ray.
    monkeypatch.setattr(tune, "ray_session", None)
    repeated = search(spec, *settings)
    assert repeated == result


def test_a_killed_search_goes_on_repeats_nothing_and_is_in_mlflow_once(search, manifest_uri, tracking_uri, tmp_path):
    spec = {"name": "small", "base": "town", "space": RATE, "budget": {"trials": 2}, "trial": {"max_concurrent": 1}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    out, overrides = tmp_path / "search", ["train.num_epochs=12", "train.keep_last=100"]
    command = [sys.executable, "-m", "jobs.tune", "--spec", tmp_path / "spec.yaml", "--manifest", manifest_uri]
    command += ["--out", out, *TINY, NO_PICTURES, f"tracking.uri={tracking_uri}", *overrides]
    driver = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "RAY_AUTH_MODE": "disabled"}
    )
    deadline = time.monotonic() + 600
    second = out / "trials" / "trial-0001" / "checkpoints"
    try:
        while not list(second.glob("step-*")):  # the first one has ended, the second one is under way
            assert time.monotonic() < deadline
            assert driver.poll() is None
            time.sleep(0.02)
    finally:
        driver.kill()
        driver.communicate()
    assert journal_of(out)["trial-0000"]["status"] == "finished"
    written = {path: path.stat().st_mtime_ns for path in (out / "trials").glob("*/checkpoints/*/checkpoint.json")}

    result = search(parse(SearchConfig, spec), *overrides)
    journal = journal_of(out)
    assert [item["status"] for item in journal.values()] == ["finished"] * 2
    assert [[numbers["epoch"] for numbers in item["evaluations"]] for item in journal.values()] == [[*range(1, 13)]] * 2
    assert {path: path.stat().st_mtime_ns for path in written} == written  # what was trained was not trained again
    assert [run.info.run_name for run in runs_below(tracking_uri, result["run_id"])] == list(journal)


def test_a_population_goes_on_from_the_donors_weights(search, manifest_uri, tmp_path):
    population = {"kind": "pbt", "perturb_every": 2, "quantile": 0.5, "is_synchronous": True}
    spec = spec_of(RATE, budget={"trials": 2}, scheduler=population)
    result = search(spec, "train.num_epochs=4", "train.keep_last=100")
    out = tmp_path / "search"
    journal = journal_of(out)
    assert result["trials"] == {"finished": 2}
    taken = [
        (name, number, item) for name, record in journal.items() for number, item in enumerate(record["generations"])
    ]
    taken = [(name, number + 1, item) for name, number, item in taken if item["donor"]]
    assert taken
    name, number, item = taken[-1]
    step = f"step-{item['step']:08d}"
    donor = out / "trials" / item["donor"]
    donor = donor if item["donor_generation"] == 1 else donor / f"generation-{item['donor_generation']}"
    ours = out / "trials" / name / f"generation-{number}"
    files = sorted(path.name for path in (donor / "checkpoints" / step).iterdir())
    assert len(files) >= 4
    for file in files:  # weights, optimizer, history: bit for bit
        assert (ours / "checkpoints" / step / file).read_bytes() == (donor / "checkpoints" / step / file).read_bytes()

    # And it went on from them: the same from that checkpoint, done here, ends in the same weights.
    base = json.loads((out / "tune.json").read_text())["base"]
    config = trial_config(base, str(out), number=int(name[-4:]), generation=number, values=item["values"])
    assert item["values"] != journal[item["donor"]]["generations"][item["donor_generation"] - 1]["values"]
    copy = parse(ExperimentConfig, {**json.loads((ours / "run.json").read_text())["config"], "output": str(tmp_path)})
    assert copy.train == config.train
    shutil.copytree(donor / "checkpoints" / step, Path(copy.folder) / "checkpoints" / step)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    worker.train(copy, device=torch.device("cpu"), on_epoch=lambda metrics: None)
    torch.set_num_threads(threads)
    last = max(path.name for path in (ours / "checkpoints").glob("step-*"))
    assert last > step
    weights = (ours / "checkpoints" / last / "model.safetensors").read_bytes()
    assert (Path(copy.folder) / "checkpoints" / last / "model.safetensors").read_bytes() == weights


def test_trials_of_two_workers_take_turns_where_there_is_room_for_one(search, tmp_path):
    # This scheduler ends the first trial's process, which leaves the room of its workers to be freed.
    spec = spec_of(RATE, budget={"trials": 2}, scheduler={"kind": "asha"}, trial={"workers": 2, "max_concurrent": 2})
    result = search(spec, "train.num_epochs=1")  # two at a time would want four CPUs of two
    assert result["trials"] == {"finished": 2}
    assert [len(item["evaluations"]) for item in journal_of(tmp_path / "search").values()] == [1, 1]


def test_a_trial_that_no_machine_can_hold_is_refused(search):
    with pytest.raises(ClusterError, match=r"trial: a trial wants 3 x 1 CPUs, this machine has 2 CPUs and 0 GPUs"):
        search(spec_of(RATE, budget={"trials": 2}, trial={"workers": 3}))


def test_a_trial_goes_on_after_the_budget_cut_it_and_after_its_process_is_lost(search, tmp_path, caplog):
    def spec(hours):
        return spec_of(RATE, budget={"trials": 1, "hours": hours})

    overrides = ["train.num_epochs=10", "train.keep_last=100"]
    with caplog.at_level("WARNING", logger="cvft"):
        cut = search(spec(1e-6), *overrides)
    assert (cut["trials"], cut["best"], cut["used_up"]) == ({"running": 1}, None, "budget.hours=1e-06")
    assert "budget.hours=1e-06 is used up: cut trial-0000 at epoch 0" in caplog.text

    checkpoints = tmp_path / "search" / "trials" / "trial-0000" / "checkpoints"

    def kill_once():
        while not list(checkpoints.glob("step-*")):
            time.sleep(0.02)
        (victim,) = (pid for pid, line in descendants(os.getpid()).items() if "ray::ImplicitFunc" in line)
        os.kill(victim, signal.SIGKILL)

    thread = threading.Thread(target=kill_once)
    thread.start()
    with caplog.at_level("WARNING", logger="cvft"):
        result = search(spec(1), *overrides)
    thread.join()
    assert result["trials"] == {"finished": 1}
    assert "trial-0000 is tried again" in caplog.text
    (journal,) = journal_of(tmp_path / "search").values()
    assert [numbers["epoch"] for numbers in journal["evaluations"]] == [*range(1, 11)]
    assert [read_info(path).step for path in sorted(checkpoints.iterdir())] == [3 * epoch for epoch in range(1, 11)]
