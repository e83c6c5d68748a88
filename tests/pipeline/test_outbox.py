import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.storage import Store
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.runs import Run, create_run
from pipeline.tracking.server import prepare
from pipeline.tracking.spool import Spool

NOBODY = "http://127.0.0.1:9"  # a port without a listener


@pytest.fixture(scope="module")
def tracking(mlflow_schema, tmp_path_factory):
    file = tmp_path_factory.mktemp("outbox") / "mlflow.db"
    shutil.copyfile(mlflow_schema, file)
    return prepare(f"sqlite:///{file}", experiment="town")


@pytest.fixture
def run(tracking, request):
    return create_run(tracking, name="a", identity=request.node.name)


@pytest.fixture(autouse=True)
def _no_retries(monkeypatch):
    """The outbox has its own; MLflow's would only make these tests longer."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def absent(run):
    """The same run while its server is away."""
    return Run(uri=NOBODY, run_id=run.run_id)


def history(run, name="loss"):
    return [(metric.step, metric.value) for metric in run.client.get_metric_history(run.run_id, name)]


def open_outbox(run, folder, **options):
    defaults = {"cache": Path("/nowhere"), "interval_s": 0.05, "retry_s": (0.05, 0.2)}
    return Outbox(run, str(folder), **{**defaults, **options})


def sent_file(outbox):
    return outbox.path.with_suffix(".sent")


def test_everything_arrives_once_and_in_order(run, tmp_path):
    with open_outbox(run, tmp_path) as outbox:
        for step in range(1500):  # two requests and a half
            outbox.log_metrics({"loss": step / 2, "rate": 0.1}, step=step)
        outbox.defer(Run.set_tags, tags={"host": "a"})
        outbox.defer(Run.log_text, text="hello", artifact_file="a.txt")
        outbox.defer(Run.finish, status="KILLED", end_time_ms=5)
    assert history(run) == [(step, step / 2) for step in range(1500)]
    assert len(history(run, "rate")) == 1500
    stored = run.client.get_run(run.run_id)
    assert (stored.data.tags["host"], stored.info.status, stored.info.end_time) == ("a", "KILLED", 5)
    assert [file.path for file in run.client.list_artifacts(run.run_id)] == ["a.txt"]


def test_metrics_arrive_while_the_training_goes_on(run, tmp_path):
    with open_outbox(run, tmp_path) as outbox:
        outbox.log_metrics({"loss": 1.0}, step=1)
        while not history(run):
            pass
        outbox.log_metrics({"loss": 2.0}, step=2)
    assert history(run) == [(1, 1.0), (2, 2.0)]


def test_a_step_that_is_done_again_after_a_crash_keeps_its_first_value(run, tmp_path):
    with open_outbox(run, tmp_path) as outbox:
        for step in range(8):
            outbox.log_metrics({"loss": 1.0}, step=step)
    with open_outbox(run, tmp_path / "another machine") as outbox:
        for step in range(5, 10):
            outbox.log_metrics({"loss": 2.0}, step=step)
            outbox.log_metrics({"loss": 3.0}, step=step)
    assert history(run) == [(step, 1.0 if step < 8 else 2.0) for step in range(10)]


@pytest.mark.parametrize("position", ["", "0", "71"])
def test_a_position_that_is_lost_or_behind_doubles_nothing(run, tmp_path, position):
    with open_outbox(run, tmp_path) as outbox:
        for step in range(10):
            outbox.log_metrics({"loss": step}, step=step)
    sent_file(outbox).write_text(position)
    with open_outbox(run, tmp_path) as outbox:
        outbox.log_metrics({"loss": 10}, step=10)
    assert history(run) == [(step, step) for step in range(11)]


def test_lines_lost_with_the_machines_power_do_not_swallow_later_ones(run, tmp_path):
    with open_outbox(run, tmp_path) as outbox:
        for step in range(10):
            outbox.log_metrics({"loss": 1.0}, step=step)
    os.truncate(outbox.path, outbox.path.stat().st_size - 30)
    with open_outbox(run, tmp_path) as outbox:
        for step in range(9, 12):
            outbox.log_metrics({"loss": 1.0}, step=step)
    assert [step for step, _ in history(run)] == list(range(12))


def test_what_a_killed_process_kept_is_sent_and_its_torn_line_is_named(run, tmp_path, caplog):
    path = tmp_path / f"outbox/{run.run_id}.jsonl"
    script = str(Path(__file__).with_name("spool_process.py"))
    with subprocess.Popen([sys.executable, script, str(path)], stdout=subprocess.PIPE, text=True) as process:
        told = [int(process.stdout.readline()) for _ in range(50)]
        process.send_signal(signal.SIGKILL)
        told += [int(line) for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    with path.open("ab") as file:
        file.write(b'{"step": 10000, "timest')  # a kill within a write is rare
    with open_outbox(run, tmp_path) as outbox:
        outbox.log_metrics({"loss": -1.0}, step=10001)
    steps = [step for step, _ in history(run)]
    assert steps[: len(told)] == told
    assert (steps[-1], 10000 in steps, len(steps) <= len(told) + 2) == (10001, False, True)
    assert "left out a torn line" in caplog.text


def test_a_full_disk_loses_what_it_does_not_take_says_so_and_goes_on(run, tmp_path):
    path = tmp_path / f"outbox/{run.run_id}.jsonl"
    command = [sys.executable, str(Path(__file__).with_name("spool_process.py")), str(path), "1000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.count("cannot keep a line for MLflow") == 1
    last = int(done.stdout.splitlines()[-1])
    open_outbox(run, tmp_path).close()
    assert [step for step, _ in history(run)] == [*range(last - 2), last + 1]


def test_a_server_that_is_away_is_told_of_once_and_gets_everything_later(run, tmp_path, caplog):
    outbox = open_outbox(absent(run), tmp_path)
    for step in range(5):
        outbox.log_metrics({"loss": step}, step=step)
    while "is away" not in caplog.text:
        pass
    outbox.defer(Run.set_tags, tags={"host": "a"})
    assert outbox.close() == 6
    assert caplog.text.count("is away") == 1
    assert f"6 entries for MLflow at {NOBODY} wait in {outbox.path}" in caplog.text
    with open_outbox(run, tmp_path) as later:
        later.log_metrics({"loss": 5}, step=5)
    assert history(run) == [(step, step) for step in range(6)]
    assert later.close() == 0


def test_a_store_that_stalls_delays_nobody_and_is_left_behind_at_the_end(run, tmp_path, tracking, caplog):
    with sqlite3.connect(tracking.uri.removeprefix("sqlite:///"), isolation_level=None) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        outbox = open_outbox(run, tmp_path)
        outbox.log_metrics({"loss": 1.0}, step=1)
        assert outbox.close(wait_s=0.2) == 1
        lock.execute("ROLLBACK")
    # The thread that was left behind may still send its part; the next outbox waits for it.
    with open_outbox(run, tmp_path) as later:
        later.log_metrics({"loss": 2.0}, step=2)
    assert history(run) == [(1, 1.0), (2, 2.0)]


def test_several_processes_may_log_and_one_at_a_time_sends(run, tmp_path):
    with open_outbox(run, tmp_path) as one, open_outbox(run, tmp_path) as other:
        for step in range(200):
            (one, other)[step % 2].log_metrics({"loss": step}, step=step)
    assert history(run) == [(step, step) for step in range(200)]


def test_what_mlflow_refuses_is_set_aside_and_the_rest_arrives(run, tmp_path, caplog):
    with open_outbox(run, tmp_path) as outbox:
        outbox.log_metrics({"loss": 1.0}, step=1)
        outbox.log_metrics({"not a name!": 1.0}, step=1)
        outbox.defer(Run.set_tags, tags={"": "no name"})
        outbox.log_metrics({"loss": 2.0}, step=2)
    assert history(run) == [(1, 1.0), (2, 2.0)]
    aside = Spool(tmp_path / f"outbox/{run.run_id}.refused.jsonl")
    assert [list(entry.content)[-1] for entry in aside.pending()] == ["metrics", "arguments"]
    assert "2 refused by it" in caplog.text


def test_only_calls_that_can_be_repeated_from_a_file_may_wait(run, tmp_path):
    with open_outbox(run, tmp_path) as outbox, pytest.raises(ValueError, match="log_artifacts cannot wait"):
        outbox.defer(Run.log_artifacts, paths=[])


@pytest.mark.objectstore
def test_with_the_folder_in_a_store_another_machine_sends_what_this_one_could_not(run, tmp_path, s3_uri):
    with open_outbox(absent(run), s3_uri, cache=tmp_path / "one") as outbox:
        for step in range(5):
            outbox.log_metrics({"loss": step}, step=step)
    assert outbox.path.is_relative_to(tmp_path / "one")
    assert len(Store.from_uri(s3_uri).list("outbox")) == 1
    with open_outbox(run, s3_uri, cache=tmp_path / "other") as later:
        later.log_metrics({"loss": 4.0}, step=4)
        later.log_metrics({"loss": 5.0}, step=5)
    assert history(run) == [(step, step) for step in range(6)]
    assert Store.from_uri(s3_uri).list("outbox") == []
    open_outbox(run, s3_uri, cache=tmp_path / "one").close()  # its disk still holds the same entries
    assert history(run) == [(step, step) for step in range(6)]


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_torn_lost_or_away_every_kept_step_arrives_once_with_its_first_value(run, tmp_path, seed):
    chance = random.Random(seed)
    expected, done = {}, 0
    for start in range(6):
        place = run if chance.random() < 0.6 else absent(run)
        outbox = open_outbox(place, tmp_path)
        for step in range(max(0, done - chance.randrange(20)), done + chance.randrange(1, 40)):
            outbox.log_metrics({"loss": start}, step=step)
            expected.setdefault(step, start)
            done = max(done, step + 1)
        outbox.close()
        if chance.random() < 0.5:
            sent_file(outbox).unlink(missing_ok=True)
        if chance.random() < 0.5:
            with outbox.path.open("ab") as file:
                file.write(b'{"step": 999999, "metr')
    open_outbox(run, tmp_path).close()
    assert history(run) == sorted(expected.items())


def test_a_folder_waits_where_it_lies_and_one_that_is_gone_holds_up_nothing(run, tmp_path, caplog):
    for name in ("kept", "gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"png")
    with open_outbox(absent(run), tmp_path) as outbox:
        for name in ("gone", "kept"):
            outbox.defer(Run.log_folder, source=str(tmp_path / name), artifact_path=name)
        outbox.log_metrics({"loss": 1.0}, step=1)
    shutil.rmtree(tmp_path / "gone")
    open_outbox(run, tmp_path).close()
    assert history(run) == [(1, 1.0)]
    assert [file.path for file in run.client.list_artifacts(run.run_id)] == ["kept"]
    assert "gone: holds no file to log as an artifact; kept in" in caplog.text
