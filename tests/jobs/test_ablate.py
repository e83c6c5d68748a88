"""An ablation trains every variant with every seed once, goes on where it was, and leaves a table and a picture."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from cvft.errors import ConfigError
from jobs import ablate
from jobs.ablation import ABLATIONS, load_ablation, plan_trials
from pipeline.runner import Here
from tests.jobs.conftest import NO_PICTURES, TINY


def write_spec(folder, **changes):
    file = folder / "spec.yaml"
    variants = {"conv": {"set": ["model.head.kind=conv"]}, "cvft": {}}
    spec = {"name": "tiny", "base": "town", "reference": "conv", "seeds": [0, 1], "variants": variants, **changes}
    file.write_text(yaml.safe_dump(spec))
    return str(file)


@pytest.mark.parametrize("name", sorted(path.stem for path in ABLATIONS.glob("*.yaml")))
def test_every_specification_resolves(name):
    spec = load_ablation(name)
    trials = plan_trials(spec, manifest="m.parquet", out="runs")
    assert len(trials) == len(spec.seeds) * len(spec.variants)
    assert len({trial.config["name"] for trial in trials}) == len(trials)


def test_a_variants_own_setting_wins_over_what_is_set_for_all(tmp_path):
    spec = load_ablation(write_spec(tmp_path))
    trials = plan_trials(
        spec, manifest="m", out="runs", overrides=["model.head.kind=global_pool", "train.num_epochs=3"]
    )
    kinds = [(trial.variant, trial.seed, trial.config["model"]["head"]["kind"]) for trial in trials]
    assert kinds == [
        (name, seed, kind) for seed in (0, 1) for name, kind in (("conv", "conv"), ("cvft", "global_pool"))
    ]
    assert {trial.config["train"]["num_epochs"] for trial in trials} == {3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "vgg"}, "reference: 'vgg' is not one of the variants 'conv', 'cvft'"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"variants": {"conv": {"set": ["model.head.knd=conv"]}}}, "variants.conv: model.head.knd: unknown key"),
        ({"variants": {"conv": {"sets": []}}}, "variants.conv.sets: unknown key"),
    ],
)
def test_a_mistake_in_a_specification_is_named(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        plan_trials(load_ablation(write_spec(tmp_path, **changes)), manifest="m", out="runs")


def test_an_unknown_specification_is_told_with_those_that_there_are():
    with pytest.raises(ConfigError, match=r"--spec nowhere: no such file, and no such ablation; there are: .*town"):
        load_ablation("nowhere")


def test_an_ablation_trains_each_seed_once_and_is_only_read_the_second_time(manifest_uri, tracking_uri, tmp_path):
    def run(*overrides, **changes):
        return ablate.ablate(
            load_ablation(write_spec(tmp_path, **changes)),
            manifest=manifest_uri,
            out=tmp_path / "out",
            runner=Here(),
            overrides=["train.num_epochs=1", f"tracking.uri={tracking_uri}", *TINY, NO_PICTURES, *overrides],
            num_threads=torch.get_num_threads(),
        )

    first = run()
    assert first["trainings"] == 4
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 10_000
    numbers = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert {(trial["variant"], trial["seed"]) for trial in numbers["trials"]} == {
        (name, seed) for name in ("conv", "cvft") for seed in (0, 1)
    }
    checkpoints = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("checkpoint.json")}
    assert len(checkpoints) == 4
    assert run() == first
    assert {path: path.stat().st_mtime_ns for path in checkpoints} == checkpoints
    with pytest.raises(ConfigError, match=r"train.num_epochs=2 \(was 1\); choose another --out for 'conv'"):
        run("train.num_epochs=2")
    other_variants = {"a_new_one": {}, "conv": {"set": ["model.head.kind=conv"]}}
    with pytest.raises(
        ConfigError, match=r"model.head.kind='cvft' \(was 'conv'\); choose another --out for 'a_new_one'"
    ):
        run(variants=other_variants)
