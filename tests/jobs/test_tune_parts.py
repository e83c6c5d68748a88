"""The parts of a search that need no Ray: journal, clock, winner, and schedulers that are told of old trials."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from cvft.errors import ClusterError, ConfigError
from jobs import tune
from jobs.config import load
from jobs.search import events, run
from jobs.search.clock import Clock
from jobs.search.config import BudgetConfig, SchedulerConfig, base_of
from jobs.search.end import in_words, winner
from jobs.search.journal import Generation, Journal, TrialRecord
from jobs.search.scheduler import rungs, scheduler_of
from jobs.search.table import Table, table_rows
from jobs.search.trial import trial_config
from pipeline.ablation import Trial, summarise
from pipeline.manifest import Manifest
from pipeline.search import SearchTrial
from pipeline.storage import Store
from tests.jobs.conftest import TINY
from tests.jobs.test_tune_space import record, spec_of


def journal_at(folder, guard=lambda: None) -> Journal:
    return Journal(store=Store.from_uri(folder), patience_s=0, guard=guard)


def evaluation(epoch, recall):
    return {"epoch": epoch, "step": 4 * epoch, "recall_at_1": recall}


@pytest.mark.parametrize("is_remote", [False, pytest.param(True, marks=pytest.mark.objectstore)])
def test_a_journal_is_read_as_it_was_written(tmp_path, request, is_remote):
    place = request.getfixturevalue("s3_uri") if is_remote else tmp_path
    journal = journal_at(place)
    first = TrialRecord(
        number=0, generations=(Generation(values={"train.loss.gamma": 3.5, "train.augment.flip": 0.0}),)
    )
    taken = Generation(values={"train.loss.gamma": 4.2}, donor="trial-0000", donor_generation=1, epoch=2, step=8)
    second = replace(
        first, number=11, generations=(*first.generations, taken), status="failed", reason="why", seconds=1.5
    )
    second = second.then(evaluation(1, 0.5))
    for item in (second, first):
        journal.put(item)
    again = journal_at(place)
    again.load()
    assert list(again.in_order()) == [first, second]
    trial = second.report("run")
    assert isinstance(trial, SearchTrial)
    assert (trial.name, trial.donor, trial.run_id, trial.best("recall_at_1")) == (
        "trial-0011",
        "trial-0000",
        "run",
        0.5,
    )


def test_an_evaluation_told_again_replaces_itself_and_what_came_after_it():
    item = record(0, {}, recalls=(0.1, 0.2, 0.3))
    assert item.then({"epoch": 2, "recall_at_1": 0.5}).evaluations == (
        {"epoch": 1, "recall_at_1": 0.1},
        {"epoch": 2, "recall_at_1": 0.5},
    )


def test_a_driver_that_was_taken_over_writes_nothing(tmp_path):
    def guard():
        raise KeyError("taken over")

    with pytest.raises(KeyError):
        journal_at(tmp_path, guard).put(record(0, {}))
    assert not list(tmp_path.iterdir())


def test_the_clock_goes_on_where_an_earlier_start_left_it(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("jobs.search.clock.time", SimpleNamespace(monotonic=lambda: now[0]))
    journal = journal_at(tmp_path)
    journal.records[0] = replace(record(0, {}), seconds=1000.0)
    clock = Clock(BudgetConfig(hours=2, gpu_hours=1.5), journal, gpus_per_trial=4, seconds=3600.0)
    now[0] += 300
    clock.tick([0])
    assert (clock.seconds, journal.records[0].seconds) == (3900.0, 1300.0)
    assert clock.gpu_hours == pytest.approx(4 * 1300 / 3600)
    assert clock.used_up == ""
    now[0] += 51
    clock.tick([0])
    assert clock.used_up == "budget.gpu_hours=1.5"
    now[0] += 3249
    clock.tick([])
    assert clock.used_up == "budget.hours=2"


def search_with(records, **scheduler):
    config = SchedulerConfig(**scheduler)
    journal = SimpleNamespace(in_order=lambda: iter(records))
    spec = SimpleNamespace(scheduler=config, metric="recall_at_1")
    base = SimpleNamespace(train=SimpleNamespace(num_epochs=9))
    return SimpleNamespace(spec=spec, base=base, journal=journal)


class Told:
    """What a scheduler looks at of a trial."""

    def __init__(self, trial_id):
        self.trial_id = trial_id


def decisions(scheduler, trials):
    """Tell a scheduler of trials one after the other, as Tune does; return the epochs after which they ended."""
    controller = SimpleNamespace(get_live_trials=list)
    reached = []
    for name, recalls in trials:
        trial = Told(name)
        scheduler.on_trial_add(controller, trial)
        for epoch, recall in enumerate(recalls, start=1):
            if scheduler.on_trial_result(controller, trial, evaluation(epoch, recall)) == "STOP":
                break
        reached.append(epoch)
        scheduler.on_trial_complete(controller, trial, evaluation(epoch, recalls[epoch - 1]))
    return reached


def asha_by_hand(trials, milestones, factor):
    """Successive halving, written down anew: at each rung the best `1/factor` of those that came so far go on."""
    recorded = {milestone: [] for milestone in milestones}
    reached = []
    for _, recalls in trials:
        for epoch, recall in enumerate(recalls, start=1):
            if epoch in recorded:
                before = sorted(recorded[epoch])
                recorded[epoch].append(recall)
                if before and recall < np.percentile(before, 100 * (1 - 1 / factor)):
                    break
        reached.append(epoch)
    return reached


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_scheduler_told_of_old_trials_again_decides_as_one_that_saw_them(kind):
    generator = np.random.default_rng(0)
    trials = [(f"trial-{n:04d}", np.sort(generator.uniform(size=9)).tolist()) for n in range(16)]
    straight = decisions(scheduler_of(search_with([], kind=kind)), trials)
    old = [
        record(number, {}, status="finished" if epochs == 9 else "stopped", recalls=trials[number][1][:epochs])
        for number, epochs in enumerate(straight[:7])
    ]
    assert decisions(scheduler_of(search_with(old, kind=kind)), trials[7:]) == straight[7:]
    assert min(straight) < 9
    if kind == "asha":
        assert rungs(SchedulerConfig(kind="asha"), 10) == (1, 3, 9)
        assert straight == asha_by_hand(trials, (1, 3), 3.0)


def test_a_trial_that_tells_its_epochs_again_is_judged_once():
    scheduler = scheduler_of(search_with([], kind="median", min_samples=1))
    controller = SimpleNamespace(get_live_trials=list)
    trials = [Told("0"), Told("1")]
    for epoch in (1, 2, 1, 2):  # the second time after its process was lost
        assert scheduler.on_trial_result(controller, trials[0], evaluation(epoch, 0.1 * epoch)) == "CONTINUE"
    assert scheduler.on_trial_result(controller, trials[1], evaluation(1, 0.05)) == "STOP"


def test_the_winner_is_the_best_finished_trial_and_the_first_of_equals():
    trials = [
        record(0, {}, status="failed", recalls=()),
        record(1, {}, recalls=(0.2, 0.5, 0.4)),
        record(2, {}, recalls=(0.5,)),
        record(3, {}, status="stopped", recalls=(0.9,)),
    ]
    assert winner(trials, "recall_at_1").number == 1
    assert winner([trials[0], trials[3]], "recall_at_1").number == 3
    assert winner(trials[:1], "recall_at_1") is None


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ((0.01, -0.01, 0.02), "a tie: the difference is within the noise"),
        ((0.3, 0.31, 0.29), "better than the default"),
        ((-0.3, -0.31, -0.29), "worse than the default"),
        ((0.3,), "one seed tells nothing"),
    ],
)
def test_a_winner_within_the_noise_is_called_a_tie(gains, words):
    def metrics(recall):
        return {f"recall_at_{k}": recall for k in ("1", "5", "10", "1_percent")}

    trials = [Trial(variant="default", seed=seed, metrics=metrics(0.5)) for seed in range(len(gains))]
    trials += [Trial(variant="trial-0003", seed=seed, metrics=metrics(0.5 + gain)) for seed, gain in enumerate(gains)]
    assert in_words(tuple(summarise(trials, reference="default"))) == words
    assert in_words(()) == "not compared (final.seeds is empty)"


def test_the_table_has_a_row_for_each_trial_and_a_column_for_each_key():
    rows = table_rows(
        [record(0, {"train.loss.gamma": 12.3456}), record(1, {"a.kind": "x"}, recalls=())], metric="recall_at_1"
    )
    assert [row.split() for row in rows] == [
        ["trial", "status", "epoch", "recall_at_1", "time", "gamma", "kind"],
        ["trial-0000", "finished", "1", "10.00", "%", "0", "s", "12.35"],
        ["trial-0001", "finished", "0", "0", "s", "x"],
    ]


def read_terminal(reader: int) -> bytes:
    """Read a terminal to its end: what was written may come in parts."""
    parts = []
    with os.fdopen(reader, "rb", buffering=0) as screen, contextlib.suppress(OSError):  # EIO: its other end is closed
        while part := screen.read(10_000):
            parts.append(part)
    return b"".join(parts)


def test_in_a_terminal_the_table_is_drawn_over_itself_and_in_a_log_it_is_a_line(monkeypatch, caplog):
    journal = SimpleNamespace(
        in_order=lambda: iter([record(0, {"train.loss.gamma": 5.0}), record(1, {}, status="failed")])
    )
    spec = SimpleNamespace(metric="recall_at_1")
    search = SimpleNamespace(spec=spec, journal=journal, proposer=SimpleNamespace(num_trials=4))
    reader, writer = os.openpty()
    with os.fdopen(writer, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", terminal)
        table = Table(search)
        table.show(running=2)
        table.show(running=2)  # too early
        table.show(running=0, is_last=True)
    drawn = read_terminal(reader).decode()
    first, second = drawn.split("\x1b[4A\x1b[J")
    assert first.replace("2 running", "0 running") == second
    assert "search: 2/4 trials begun, 2 running, 1 finished, 1 failed, best 10.00 % (trial-0000)" in first
    with caplog.at_level("INFO", logger="cvft"):
        Table(search).show(running=1)
        Table(search).tell_end(record(1, {"train.loss.gamma": 5.0}, status="stopped"))
    assert list(caplog.messages) == [
        "search: 2/4 trials begun, 1 running, 1 finished, 1 failed, best 10.00 % (trial-0000)",
        "trial-0001 stopped early after epoch 1, best recall_at_1 10.00 % (gamma 5)",
    ]


def test_each_generation_of_a_trial_has_a_folder_of_its_own(tmp_path):
    base = {**json.loads(json.dumps(dataclasses.asdict(load("town", [])))), "output": "elsewhere"}
    first, second = (
        trial_config(base, str(tmp_path), number=7, generation=generation, values={"train.loss.gamma": 5.0})
        for generation in (1, 2)
    )
    assert first.folder == f"{tmp_path}/trials/trial-0007"
    assert second.folder == f"{tmp_path}/trials/trial-0007/generation-2"
    assert first.train.loss.gamma == second.train.loss.gamma == 5.0


def test_a_folder_that_holds_another_search_is_refused_by_what_differs(tmp_path, manifest_uri):
    manifest, store = Manifest.load(manifest_uri), Store.from_uri(tmp_path)

    def enter(spec, *overrides):
        base = base_of(spec, manifest=manifest_uri, out=str(tmp_path), overrides=[*TINY, *overrides])
        return tune._enter(spec, base, manifest, store)

    spec = spec_of()
    about = enter(spec)
    (tmp_path / "tune.json").write_text(json.dumps({**about, "seconds": 12.5}))
    longer = replace(spec, budget=BudgetConfig(trials=20, hours=3), trial=replace(spec.trial, max_concurrent=1))
    assert enter(longer, "data.num_threads=2")["seconds"] == 12.5
    with pytest.raises(ConfigError, match=r"another search was begun here: searcher.seed=1 \(was 0\); name another"):
        enter(replace(spec, searcher=replace(spec.searcher, seed=1)))
    with pytest.raises(ConfigError, match=r"base.train.num_epochs=3 \(was 16\)"):
        enter(spec, "train.num_epochs=3")
    (tmp_path / "tune.json").write_text(json.dumps({**about, "manifest_digest": "0" * 64}))
    with pytest.raises(ConfigError, match=r"begun here: manifest \w{16} \(was 0{16}\)"):
        enter(spec)


@pytest.mark.parametrize(
    ("trial", "cpus", "can_grow", "most"),
    [
        ({}, 3, False, None),
        ({"max_concurrent": 2}, 3, False, 2),
        ({"workers": 2}, 5, False, 2),
        ({"workers": 2, "max_concurrent": 4}, 5, False, 2),
        ({"workers": 2, "max_concurrent": 4}, 5, True, 4),
        ({"workers": 2, "max_concurrent": 4}, 0, True, 4),
        ({"workers": 2}, 0, True, 1),
    ],
)
def test_as_many_trials_at_a_time_as_have_room_or_will_have(monkeypatch, trial, cpus, can_grow, most):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(run.ray, "cluster_resources", lambda: {"CPU": float(cpus)})
    assert run._most_at_a_time(SimpleNamespace(spec=spec_of(trial=trial)), can_grow=can_grow) == most


def test_a_trial_that_this_machine_cannot_hold_is_refused(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(run.ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(ClusterError, match="a trial wants 4 x 1 CPUs, this machine has 2 CPUs and 0 GPUs"):
        run._most_at_a_time(SimpleNamespace(spec=spec_of(trial={"workers": 4})), can_grow=False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "Failure # 1 (occurred at 2026-11-26)\n\x1b[36mray::ImplicitFunc.train()\x1b[39m (pid=1, ip=10.0.0.1)\n"
            '  File "actor.py", line 1, in remote\nValueError: no such actor\n',
            "ValueError: no such actor",
        ),
        ("Failure # 1 (occurred at 2026-11-26)\nTraceback (most recent call last):\nKeyError: 'x'\n", "KeyError: 'x'"),
        (
            "Failure # 1 (a)\nKeyError\nFailure # 2 (b)\nThe actor died unexpectedly.\n\tclass_name: ImplicitFunc\n",
            "The actor died unexpectedly.",
        ),
        ("Failure # 1 (occurred at 2026-11-26)\n", "its process ended without a word"),
    ],
)
def test_why_a_trial_failed_is_its_error_and_not_where_it_was_raised(tmp_path, text, reason):
    file = tmp_path / "error.txt"
    file.write_text(text)
    assert events._reason(SimpleNamespace(error_file=str(file))) == reason
