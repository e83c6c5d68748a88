"""An official-format checkpoint, written by TensorFlow itself, becomes one of ours."""

import importlib
import importlib.util
import sys

import numpy as np
import pytest
import torch

from cvft.checkpoint import load_model, read_info
from cvft.config import HeadConfig, ModelConfig, PreprocessConfig
from cvft.errors import CheckpointError, MissingExtraError
from pipeline.official_import import import_official
from tests.golden import recipe

PREFIXES = {"cvft": "CVFT", "conv": "VGG_conv", "global_pool": "VGG_gp"}


@pytest.fixture(scope="module")
def tensorflow():
    """TensorFlow 1's interface, in which the official script is written."""
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip('TensorFlow is not installed: pip install "cvft[tensorflow]"')
    return importlib.import_module("tensorflow").compat.v1


def save_official(tensorflow, prefix, variables):
    """Write variables as the official script's `tf.train.Saver` does."""
    with tensorflow.Graph().as_default(), tensorflow.Session() as session:
        for name, value in variables.items():
            zeros = tensorflow.zeros_initializer()
            tensorflow.get_variable(name, np.shape(value), value.dtype, zeros, use_resource=False)
        for variable in tensorflow.global_variables():
            variable.load(variables[variable.op.name], session)
        tensorflow.train.Saver().save(session, str(prefix), write_meta_graph=False)


def with_adam(variables):
    """Add what the official script's Adam keeps: two moments for some variables, its powers and a counter."""
    left = {"beta1_power": np.float32(0.9), "beta2_power": np.float32(0.999), "global_step": np.int64(7)}
    for name in ("VGG_grd/conv5_3/biases", "VGG_sat/conv4_1/weights"):
        left |= {f"{name}/Adam": variables[name], f"{name}/Adam_1": variables[name]}
    return variables | left


@pytest.mark.tensorflow
@pytest.mark.slow
@pytest.mark.parametrize("kind", list(PREFIXES))
def test_an_official_checkpoint_gives_the_authors_descriptors(kind, tensorflow, tmp_path):
    save_official(tensorflow, tmp_path / "model.ckpt", with_adam(recipe.variables(kind)))
    info = import_official(str(tmp_path / "model.ckpt"), tmp_path / "imported")
    assert info == read_info(tmp_path / "imported")
    assert info.model == ModelConfig(head=HeadConfig(kind=kind))
    assert info.preprocess == PreprocessConfig()
    model, _ = load_model(tmp_path / "imported")
    with torch.no_grad():
        ground, aerial = model(*(torch.from_numpy(image).permute(0, 3, 1, 2) for image in recipe.images()))
    with np.load(recipe.VECTORS) as golden:
        np.testing.assert_allclose(ground, golden[f"{PREFIXES[kind]}_grd"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(aerial, golden[f"{PREFIXES[kind]}_sat"], rtol=0, atol=1e-5)


@pytest.mark.tensorflow
def test_a_checkpoint_of_another_graph_is_refused_by_name_and_leaves_nothing(tensorflow, tmp_path):
    save_official(tensorflow, tmp_path / "model.ckpt", {"resnet/conv1/weights": np.zeros((3, 3, 3, 8), np.float32)})
    message = r"model\.ckpt does not fit the model: VGG_grd/conv1_1/weights is missing"
    with pytest.raises(CheckpointError, match=message):
        import_official(str(tmp_path / "model.ckpt"), tmp_path / "imported", head="cvft")
    assert not (tmp_path / "imported").exists()


@pytest.mark.tensorflow
@pytest.mark.parametrize("suffix", [".index", ".data-00000-of-00001"])
def test_a_damaged_checkpoint_is_one_clear_line(suffix, tensorflow, tmp_path):
    save_official(tensorflow, tmp_path / "model.ckpt", {"sat_conv/weights": np.ones((64, 64), np.float32)})
    damaged = tmp_path / f"model.ckpt{suffix}"
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"model\.ckpt: cannot read this TensorFlow checkpoint: .") as caught:
        import_official(str(tmp_path / "model.ckpt"), tmp_path / "imported")
    assert "\n" not in str(caught.value)


@pytest.mark.tensorflow
@pytest.mark.usefixtures("tensorflow")
def test_a_missing_checkpoint_is_named_with_what_to_give(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.ckpt: cannot read .* give the path without \.index"):
        import_official(str(tmp_path / "nowhere.ckpt"), tmp_path / "imported")


def test_without_tensorflow_the_extra_to_install_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # Python's own word for "cannot be imported"
    with pytest.raises(MissingExtraError, match=r'pip install "cvft\[tensorflow\]"'):
        import_official(str(tmp_path / "model.ckpt"), tmp_path / "imported")
