"""`infra/monitoring`: names and rules, offline; `make test-monitoring` asks a real Prometheus."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from jobs.metrics import FROM_MLFLOW, METRICS
from tests.infra import monitoring_files as files
from tests.infra import validators


def test_every_metric_that_is_drawn_or_watched_is_exported_by_us_or_by_ray():
    known = files.exported() | files.of_ray() | {"up"}
    expressions = [expression for _, expression in files.targets()] + [rule["expr"] for rule in files.alerts()]
    for expression in expressions:
        assert files.names(expression) <= known, expression


def test_every_metric_that_we_export_is_drawn_or_watched():
    expressions = [expression for _, expression in files.targets()] + [rule["expr"] for rule in files.alerts()]
    assert files.exported() <= set().union(*map(files.names, expressions))


@pytest.mark.parametrize("expression", ["sum(rate(ray_cvft_train_pairs_total[1m])", "rate(ray_cvft_train_pairs)[1m]"])
def test_a_broken_expression_is_caught(expression):
    with pytest.raises(ValueError, match=r"."):
        files.names(expression)


@pytest.mark.parametrize("name", ["ray_cvft_train_pairs", "ray_cvft_train_los", "ray_node_gpu_use"])
def test_a_name_that_nobody_exports_is_caught(name):
    assert not files.names(f"max(rate({name}[1m]))") <= files.exported() | files.of_ray()


def test_what_is_told_to_mlflow_and_shown_has_a_metric():
    assert set(FROM_MLFLOW.values()) <= {name for name, (kind, _, _) in METRICS.items() if kind == "gauge"}


def test_a_series_is_asked_for_by_labels_it_has():
    labels = {f"ray_{name}": set(keys) for name, (_, keys, _) in METRICS.items()}
    for _, expression in files.targets():
        for name in files.names(expression) & files.exported():
            if 'run=~"' in expression:
                assert "run" in labels[name.removesuffix("_total")], expression


def test_panels_say_what_they_show_and_do_not_overlap():
    board = files.dashboard()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for one, other in itertools.combinations([panel["gridPos"] for panel in board["panels"]], 2):
        is_beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert is_beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    for panel in files.panels():
        assert panel["description"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        for override in panel["fieldConfig"]["overrides"]:
            assert override["matcher"]["options"] in references


def test_the_issue_s_seven_are_drawn():
    titles = " ".join(title for title, _ in files.targets()).lower()
    for wanted in ("pairs per second", "waiting for data", "gpu", "recall by epoch", "shard", "cache", "restarts"):
        assert wanted in titles


def test_every_alert_says_what_it_means_and_what_to_do_and_has_a_test():
    tested = (files.FOLDER / "rules" / "alerts.test.yml").read_text(encoding="utf-8")
    for rule in files.alerts():
        assert set(rule["annotations"]) == {"summary", "action"}
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["alert"] in tested


def _promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian's package prometheus): rules were not run")
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", sorted(path.name for path in files.FOLDER.glob("prometheus*.yml")))
def test_promtool_takes_the_configuration_and_its_rules(name):
    done = _promtool("check", "config", str(files.FOLDER / name))
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_sees_each_alert_fire():
    done = _promtool("test", "rules", str(files.FOLDER / "rules" / "alerts.test.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_catches_a_broken_configuration_and_a_broken_rule(tmp_path):
    broken = tmp_path / "prometheus.yml"
    broken.write_text((files.FOLDER / "prometheus.yml").read_text(encoding="utf-8").replace("job_name", "job_nam"))
    assert _promtool("check", "config", str(broken)).returncode != 0
    rules = tmp_path / "alerts.yml"
    rules.write_text((files.FOLDER / "rules" / "alerts.yml").read_text(encoding="utf-8").replace("> 0.3", "> > 0.3"))
    assert _promtool("check", "rules", str(rules)).returncode != 0


def test_grafana_reads_the_dashboard_where_compose_mounts_it():
    composition = yaml.safe_load((validators.INFRA / "compose" / "compose.yaml").read_text(encoding="utf-8"))
    mounts = {
        mount["target"]: (validators.INFRA / "compose" / mount["source"]).resolve()
        for name in ("grafana", "prometheus")
        for mount in composition["services"][name]["volumes"]
        if isinstance(mount, dict)
    }
    provider = files.FOLDER / "grafana" / "provisioning" / "dashboards" / "cvft.yml"
    (provisioned,) = validators.documents(provider)
    folder = provisioned["providers"][0]["options"]["path"]
    assert (mounts[folder] / "cvft.json").is_file()
    assert mounts["/etc/grafana/provisioning"] == provider.parents[1]
    (command,) = [word for word in composition["services"]["prometheus"]["command"] if "config.file" in word]
    assert (mounts["/etc/prometheus"] / Path(command).name).is_file()
