"""A training's folder is only gone on with by the same training, whichever release wrote what it says."""

import json
from pathlib import Path

import pytest

from cvft.checkpoint import INFO_FILE
from cvft.errors import ConfigError
from jobs import run_file
from jobs.config import preset_names
from pipeline.checkpoints import checkpoint_name
from pipeline.manifest import Manifest


@pytest.fixture
def begun(tiny, manifest_uri):
    """Begin a training, or find it begun; its folder holds a checkpoint from then on."""

    def enter(*overrides: str) -> bool:
        config = tiny(*overrides)
        _, is_continued = run_file.enter(config, Manifest.load(manifest_uri), remedy="look elsewhere")
        checkpoint = Path(config.folder) / "checkpoints" / checkpoint_name(1)
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / INFO_FILE).touch()
        return is_continued

    return enter


def test_where_things_lie_and_what_computes_may_differ(begun):
    assert not begun()
    assert begun("train.chunk_size=2", "train.compile=true", "data.keep_pixels=host", "train.checkpoint_every_steps=3")
    assert begun("train.node_labels={ray.io/node-group: gpu}")


def test_what_changes_the_numbers_is_refused_by_its_key(begun):
    begun()
    with pytest.raises(ConfigError, match=r"begun otherwise: train.ema_decay=0.9 \(was None\); look elsewhere"):
        begun("train.ema_decay=0.9")


def test_a_key_that_an_earlier_release_did_not_have_stood_at_its_default(begun, tmp_path):
    begun()
    file = tmp_path / "runs/town" / run_file.RUN_FILE
    content = json.loads(file.read_bytes())
    for key in ("sampling", "augment", "activation_checkpointing"):
        del content["config"]["train"][key]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"begun otherwise: train.sampling.pool_size=64 \(was 128\); look elsewhere"):
        begun("train.sampling.pool_size=64")
    assert begun()


def test_the_presets_are_those_that_the_help_names():
    assert {"official", "modern", "town", "town_modern"} <= set(preset_names())
