"""Recall is reported on all queries, on those that do not leak, and by distance, each by its name."""

from __future__ import annotations

import contextlib
import io
import json
import shutil

import pytest
import torch

from cvft.checkpoint import CheckpointInfo
from cvft.config import BackboneConfig, HeadConfig, ModelConfig, PreprocessConfig, TransportConfig
from cvft.model import build_model
from cvft.snapshot import take_snapshot
from jobs import entry, evaluate
from pipeline import evaluation
from pipeline.checkpoints import CheckpointFolder, checkpoint_name

PREPROCESS = PreprocessConfig(ground_size_px=(16, 48), aerial_size_px=(32, 32))
CONFIG = ModelConfig(
    backbone=BackboneConfig(blocks=(1, 1), width=1 / 16, num_frozen_blocks=0),
    head=HeadConfig(channels=4, grid=(8, 8), transport=TransportConfig(init="zero")),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """An untrained network, written as a training writes it."""
    torch.manual_seed(0)
    model = build_model(CONFIG, PREPROCESS)
    folder = CheckpointFolder(str(tmp_path_factory.mktemp("run")))
    info = CheckpointInfo(model=CONFIG, preprocess=PREPROCESS, epoch=1)
    folder.write(checkpoint_name(1), take_snapshot(model=model, info=info))
    return folder.uri(checkpoint_name(1))


def measure(checkpoint: str, manifest: str, *arguments: str) -> dict:
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        assert entry.main(evaluate.JOB, ["--checkpoint", checkpoint, "--manifest", manifest, *arguments]) == 0
    return json.loads(stdout.getvalue().splitlines()[-1])


def test_query_that_leaks_is_counted_by_kind_and_left_out(checkpoint, town, make_manifest, tmp_path, caplog):
    root = tmp_path / "town"
    shutil.copytree(town, root)
    train, val = (
        (root / f"splits/{split}-19zl.csv").read_text().splitlines()[0].split(",") for split in ("train", "val")
    )
    shutil.copy(root / train[1], root / val[1])
    with caplog.at_level("INFO"):
        found = measure(checkpoint, make_manifest(root))
    assert (found["num_queries"], found["num_leaked_queries"]) == (4, 1)
    assert found["leaked_queries_by"] == {"ground_bytes": 1, "aerial_bytes": 0, "position_and_heading": 0}
    assert "4 queries among 4 references; in the training split as well: 1" in caplog.text
    assert "de-leaked" in caplog.text


def test_without_the_training_split_leaks_are_null_and_said(checkpoint, manifest_uri, caplog):
    found = measure(checkpoint, manifest_uri, "--train-split", "elsewhere")
    assert (found["num_leaked_queries"], found["recall_at_1_deleaked"]) == (None, None)
    assert isinstance(found["recall_at_1"], float)
    assert "no split 'elsewhere'" in caplog.text


def test_recall_by_distance_stands_beside_the_exact_one(checkpoint, manifest_uri):
    exact = measure(checkpoint, manifest_uri)
    near = measure(checkpoint, manifest_uri, "--hit-distance", "5")
    anywhere = measure(checkpoint, manifest_uri, "--hit-distance", "1e6")
    assert {name: value for name, value in near.items() if "within" not in name} == exact
    assert near["recall_at_1_within_5m"] >= exact["recall_at_1"]
    assert anywhere["recall_at_1_within_1000000m"] == 1.0
    assert set(near) - set(exact) == {f"recall_at_{k}_within_5m" for k in ("1", "5", "10", "1_percent")}


@pytest.mark.parametrize("distance", ["0", "-3", "nan"])
def test_distance_that_is_none_is_refused(distance, checkpoint, manifest_uri, capfd):
    arguments = ["--checkpoint", checkpoint, "--manifest", manifest_uri, "--hit-distance", distance]
    assert entry.main(evaluate.JOB, arguments) == 2
    assert "hit_distance_m" in capfd.readouterr().err


def test_distance_without_positions_is_refused_before_anything_is_embedded(
    checkpoint, town, make_manifest, tmp_path, capfd, monkeypatch
):
    nowhere = shutil.copytree(town, tmp_path / "nowhere")
    shutil.rmtree(nowhere / "split_locations")
    monkeypatch.setattr(evaluation, "embed", lambda *_, **__: 1 / 0)
    arguments = ["--checkpoint", checkpoint, "--manifest", make_manifest(nowhere), "--hit-distance", "5"]
    assert entry.main(evaluate.JOB, arguments) == 2
    assert "split 'val': no pair has a position" in capfd.readouterr().err


def test_a_limited_view_changes_the_queries_alone_and_is_the_same_in_any_batches(
    checkpoint, manifest_uri, monkeypatch, capfd
):
    seen, embed = [], evaluation.embed

    def watched(*arguments, **options):
        seen.append(embed(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(evaluation, "embed", watched)
    view = ["--fov", "90", "--unknown-orientation"]
    found = measure(checkpoint, manifest_uri, *view)
    assert (found["fov_deg"], found["is_orientation_unknown"]) == (90.0, True)
    measure(checkpoint, manifest_uri, *view, "--batch-size", "3")
    measure(checkpoint, manifest_uri, *view, "--view-seed", "1")
    measure(checkpoint, manifest_uri)
    limited, in_other_batches, otherwise, whole = seen
    torch.testing.assert_close(in_other_batches.ground, limited.ground, rtol=0, atol=1e-6)
    for other in (otherwise, whole):
        assert ((other.ground - limited.ground).abs().amax(1) > 1e-3).all()
        assert torch.equal(other.aerial, limited.aerial)
    arguments = ["--checkpoint", checkpoint, "--manifest", manifest_uri, "--fov", "400"]
    assert entry.main(evaluate.JOB, arguments) == 2
    assert "fov_deg: [400.0, 400.0] must be" in capfd.readouterr().err


def test_a_negative_seed_of_the_view_is_refused_before_anything_is_read(capsys):
    arguments = ["--checkpoint", "nowhere", "--manifest", "nowhere", "--view-seed", "-1"]
    assert entry.main(evaluate.JOB, arguments) == 2
    assert "--view-seed -1: must not be negative" in capsys.readouterr().err
