"""What a search may go through is checked before it begins; who proposes is a function of seed, number and trials."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest

from cvft.configuration import dotted_values, parse, to_plain
from cvft.errors import ConfigError
from jobs import entry, tune
from jobs.search.config import SEARCHES, SearchConfig, base_of, load_search, space_of
from jobs.search.draw import searcher_of
from jobs.search.journal import Generation, TrialRecord
from jobs.search.space import explore

KIND = {"type": "choice", "values": ["soft_margin_triplet", "info_nce"]}
GAMMA = {"type": "float", "low": 3, "high": 30, "log": True, "when": {"train.loss.kind": "soft_margin_triplet"}}
TEMPERATURE = {"type": "float", "low": 0.02, "high": 0.3, "when": {"train.loss.kind": ["info_nce"]}}
LOSS = {"train.loss.gamma": GAMMA, "train.loss.temperature": TEMPERATURE, "train.loss.kind": KIND}
RATE = {"train.optimizer.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}


def spec_of(space=None, **changes) -> SearchConfig:
    return parse(
        SearchConfig, {"name": "x", "base": "town", "space": space or LOSS, "budget": {"trials": 8}, **changes}
    )


def resolve(spec, *overrides):
    return space_of(spec, base_of(spec, manifest="m", out="/out", overrides=overrides))


def record(number, values, status="finished", recalls=(0.1,)):
    evaluations = tuple({"epoch": epoch, "recall_at_1": recall} for epoch, recall in enumerate(recalls, 1))
    return TrialRecord(number=number, generations=(Generation(values=values),), status=status, evaluations=evaluations)


@pytest.mark.parametrize("name", sorted(path.stem for path in SEARCHES.glob("*.yaml")))
def test_every_specification_resolves(name):
    spec = load_search(name)
    space = resolve(spec)
    assert searcher_of(spec, space).propose(0, [])


@pytest.mark.parametrize(
    ("key", "parameter", "message"),
    [
        ("train.loss.gama", GAMMA, "space.train.loss.gama: unknown key; did you mean train.loss.gamma?"),
        ("gamma", GAMMA, "space.gamma: unknown key; did you mean train.loss.gamma?"),
        ("train.loss.gamma", {**GAMMA, "hihg": 3}, "space.train.loss.gamma.hihg: unknown key; did you mean .*high"),
        ("train.seed", {"type": "int", "low": 0, "high": 9}, "space.train.seed: this key is not searched: .* luck"),
        (
            "data.num_threads",
            {"type": "int", "low": 1, "high": 4},
            "data.num_threads: .* does not change what is trained",
        ),
        ("train.loss.gamma", {"type": "float", "low": 3}, "space.train.loss.gamma.high: a range needs low and high"),
        ("train.loss.gamma", {"type": "float", "low": 3, "high": 3}, "gamma.high: 3.0 must be more than low=3.0"),
        (
            "train.loss.gamma",
            {"type": "float", "low": -1, "high": 3, "log": True},
            "gamma.low: -1.0 must be positive on",
        ),
        (
            "train.loss.gamma",
            {"type": "float", "low": -1, "high": 3},
            r"space.train.loss.gamma.low: -1.0 cannot be used: train.loss.gamma: -1.0 must be positive",
        ),
        (
            "train.loss.temperature",
            {"type": "float", "low": 0.1, "high": 3},
            r"temperature.high: 3.0 cannot be used: train.loss.temperature: 3.0 must lie in \[0.01, 1\]",
        ),
        (
            "train.optimizer.kind",
            {"type": "choice", "values": ["adam", "sgd"]},
            r"space.train.optimizer.kind.values\[1\]: 'sgd' cannot be used: train.optimizer.kind: 'sgd' is not one of",
        ),
        (
            "model.head.transport.num_groups",
            {"type": "choice", "values": [1, 3]},
            r"num_groups.values\[1\]: 3 cannot be used: model.head.channels: 32 must be a multiple",
        ),
        ("train.batch_size", {"type": "int", "low": 4, "high": 8.5}, "train.batch_size.high: 8.5 is no whole number"),
        ("train.batch_size", {"type": "choice", "values": []}, "batch_size.values: a choice needs a list"),
        ("model.head.grid", {"type": "choice", "values": [[8, 8]]}, r"values\[0\]: \[8, 8\] is not a single value"),
        ("train.batch_size", {"type": "choice", "values": [4, 4]}, r"values\[1\]: 4 is there twice"),
        (
            "train.loss.gamma",
            {"type": "float", "low": 1, "high": 3, "values": [1]},
            "gamma.values: they are of type choice",
        ),
        ("train.loss.gamma", {"type": "choice", "values": [1.0], "log": True}, "gamma.log: a choice has values"),
        (
            "train.loss.gamma",
            {**GAMMA, "when": {"train.loss.kin": "a"}},
            r"when.train.loss.kin: train.loss.kin is not searched",
        ),
        (
            "train.loss.gamma",
            {**GAMMA, "when": {"train.loss.kind": "mse"}},
            "train.loss.kind never takes the value 'mse'",
        ),
        ("train.loss.gamma", {**GAMMA, "when": {"train.loss.kind": []}}, "an empty list never holds"),
    ],
)
def test_a_mistake_in_the_space_is_named_by_its_key(key, parameter, message):
    with pytest.raises(ConfigError, match=message):
        resolve(spec_of({"train.loss.kind": KIND, key: parameter}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {}}, "budget: a search by random needs trials, hours or gpu_hours"),
        ({"budget": {"gpu_hours": 1}}, "budget.gpu_hours: trial.gpus is 0"),
        ({"budget": {"trials": 0}}, "budget.trials: 0 must be positive"),
        ({"searcher": {"kind": "tpe"}}, "searcher.kind: 'tpe' is not one of"),
        ({"metric": "recall"}, "metric: 'recall' is not one of recall_at_1"),
        ({"final": {"seeds": [1, 1]}}, r"final.seeds: \[1, 1\] names a seed twice"),
        ({"final": {"seeds": [3, 0]}}, r"final.seeds: \[3, 0\] holds train.seed=0, which the search uses"),
        ({"scheduler": {"kind": "asha", "grace_epochs": 17}}, "grace_epochs: 17 is more than train.num_epochs=16"),
        ({"scheduler": {"kind": "asha", "reduction_factor": 1}}, "reduction_factor: 1.0 must be more than 1"),
        ({"scheduler": {"kind": "pbt"}}, "space.train.loss.kind: pbt cannot change it under weights that stay"),
        ({"scheduler": {"kind": "pbt"}, "space": RATE, "trial": {"workers": 2}}, "trial.workers: pbt hands weights"),
        (
            {"scheduler": {"kind": "pbt"}, "space": RATE, "searcher": {"kind": "grid"}},
            "a population .* starts at random",
        ),
        ({"scheduler": {"kind": "pbt"}, "space": RATE, "trial": {"max_concurrent": 2}}, "trial.max_concurrent: 2: pbt"),
        ({"trial": {"workers": 2, "cpus": 2}}, "trial.cpus: 2: each of several workers has one CPU"),
        ({"trial": {"workers": 2, "gpus": 0.5}}, "trial.gpus: 0.5: each of several workers has a whole GPU or none"),
        ({"searcher": {"kind": "grid"}}, "space.train.loss.gamma.num: a grid needs the number of values of this range"),
    ],
)
def test_a_mistake_in_a_specification_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve(spec_of(**changes))


def test_conditions_that_run_in_a_circle_are_refused():
    space = {
        "train.augment.flip": {"type": "choice", "values": [0.0, 0.5], "when": {"train.augment.rotate": 0.75}},
        "train.augment.rotate": {"type": "choice", "values": [0.0, 0.75], "when": {"train.augment.flip": 0.5}},
    }
    with pytest.raises(
        ConfigError, match=r"the conditions of train.augment.flip, train.augment.rotate run in a circle"
    ):
        resolve(spec_of(space))


def test_a_value_that_is_possible_with_others_alone_is_not_refused():
    space = {
        "model.head.transport.num_groups": {"type": "choice", "values": [1, 3]},
        "model.head.channels": {"type": "choice", "values": [32, 30]},
    }
    spec = spec_of(space, budget={"trials": 40})
    searcher = searcher_of(spec, resolve(spec))
    drawn = {tuple(searcher.propose(number, []).values()) for number in range(40)}
    assert drawn == {(1, 32), (1, 30), (3, 30)}  # never 3 groups of 32 channels


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_drawn_values_lie_inside_and_conditions_hold(kind):
    spec = spec_of({**LOSS, **RATE}, searcher={"kind": kind, "num_random": 3})
    space, base = resolve(spec), base_of(spec, manifest="m", out="/out")
    searcher, records = searcher_of(spec, space), []
    for number in range(12):
        values = searcher.propose(number, records)
        is_triplet = values["train.loss.kind"] == "soft_margin_triplet"
        assert ("train.loss.gamma" in values, "train.loss.temperature" in values) == (is_triplet, not is_triplet)
        assert 1e-4 <= values["train.optimizer.learning_rate"] <= 1e-2
        changed = dotted_values(to_plain(space.config(values)))
        default = dotted_values(to_plain(base))
        assert {key for key in changed if changed[key] != default[key]} <= set(values)  # what is absent is the base's
        records.append(record(number, values, recalls=(0.01 * number,)))
    assert {values.values["train.loss.kind"] for values in records} == set(KIND["values"])


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_the_same_seed_proposes_the_same_and_another_one_does_not(kind):
    def propose(seed):
        spec = spec_of({**LOSS, **RATE}, searcher={"kind": kind, "seed": seed, "num_random": 2})
        searcher, records = searcher_of(spec, resolve(spec)), []
        for number in range(6):
            # Made anew for each, as a search is that was killed each time.
            searcher = searcher_of(spec, resolve(spec))
            records.append(record(number, searcher.propose(number, records), recalls=(0.1 * number,)))
        return [dict(item.values) for item in records]

    assert propose(0) == propose(0)
    assert propose(0) != propose(1)


def test_optuna_learns_where_the_good_trials_are():
    spec = spec_of(RATE, searcher={"kind": "optuna", "num_random": 4})
    searcher, records = searcher_of(spec, resolve(spec)), []
    for number in range(24):
        values = searcher.propose(number, records)
        distance = abs(np.log10(values["train.optimizer.learning_rate"]) + 3.5)
        status = "stopped" if number % 3 == 0 else "finished"
        records.append(record(number, values, status=status, recalls=(1 - distance,)))
    rates = np.log10([item.values["train.optimizer.learning_rate"] for item in records])
    early, late = np.abs(rates[:4] + 3.5).mean(), np.abs(rates[12:] + 3.5).mean()
    assert late < 0.5 * early


def test_a_grid_is_the_product_of_what_is_active():
    space = {
        **LOSS,
        "train.loss.gamma": {**GAMMA, "num": 3},
        "train.loss.temperature": {**TEMPERATURE, "step": 0.14},
        "model.head.transport.num_iterations": {"type": "int", "low": 5, "high": 7},
    }
    spec = spec_of(space, searcher={"kind": "grid"}, budget={})
    searcher = searcher_of(spec, resolve(spec))
    points = [searcher.propose(number, []) for number in range(searcher.num_trials)]
    triplet = itertools.product(["soft_margin_triplet"], np.geomspace(3, 30, 3), [5, 6, 7])
    info_nce = itertools.product(["info_nce"], [0.02, 0.16, 0.3], [5, 6, 7])
    expected = sorted([*triplet, *info_nce])
    names = ("train.loss.kind", "train.loss.gamma", "train.loss.temperature", "model.head.transport.num_iterations")
    found = sorted(tuple(point[name] for name in names if name in point) for point in points)
    assert len(found) == len(expected) == 18
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[0] == theirs[0]
        assert ours[1:] == pytest.approx(theirs[1:])


def test_points_of_a_grid_that_the_configuration_refuses_are_left_out_and_counted():
    space = {
        "model.head.transport.num_groups": {"type": "choice", "values": [1, 3]},
        "model.head.channels": {"type": "choice", "values": [32, 30]},
    }
    spec = spec_of(space, searcher={"kind": "grid"}, budget={})
    searcher = searcher_of(spec, resolve(spec))
    assert (searcher.num_trials, searcher.num_left_out) == (3, 1)
    fewer = searcher_of(replace(spec, budget=replace(spec.budget, trials=2)), resolve(spec))
    assert fewer.num_trials == 2


def test_explored_values_are_neighbours_inside_the_range():
    space = resolve(spec_of({**RATE, "train.augment.flip": {"type": "choice", "values": [0.0, 0.25, 0.5]}}))
    generator = np.random.default_rng(0)
    found = set()
    for _ in range(40):
        values = explore(
            space, {"train.optimizer.learning_rate": 9e-3, "train.augment.flip": 0.25}, generator, resample=0
        )
        found.add((values["train.optimizer.learning_rate"], values["train.augment.flip"]))
    assert found == {(rate, flip) for rate in (9e-3 * 0.8, 1e-2) for flip in (0.0, 0.5)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--spec", "nowhere"], "--spec nowhere: no such file, and no such search; there are: .*town"),
        (["--trials", "0"], "budget.trials: 0 must be positive"),
        (["train.num_epochs=1"], "scheduler.grace_epochs: 2 is more than train.num_epochs=1"),
        (["train.seed=2"], r"final.seeds: \[1, 2, 3\] holds train.seed=2"),
        (["model.head.channels=33"], "model.head.transport.num_groups.*: 2 cannot be used: model.head.channels: 33"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_nothing_is_written(arguments, message, tmp_path, capfd):
    assert entry.main(tune.JOB, ["--out", str(tmp_path / "search"), *arguments]) == 2
    error = capfd.readouterr().err
    assert re.search(message, error), error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
