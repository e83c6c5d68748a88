import functools

import numpy as np
import pytest
import torch

from cvft.config import HeadConfig, ModelConfig, PreprocessConfig
from cvft.errors import CheckpointError
from cvft.model import CrossViewModel
from cvft.official import official_head, official_state, weight_names
from tests.golden import recipe

KINDS = ("cvft", "conv", "global_pool")


@functools.cache
def official_model(kind):
    return CrossViewModel(ModelConfig(head=HeadConfig(kind=kind)), PreprocessConfig())


def zeros(kind):
    """Variables of the right shapes that take no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in recipe.variable_shapes(kind).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_read_off_the_variables(kind):
    assert official_head(recipe.variable_shapes(kind)) == kind


def test_kernels_and_the_fully_connected_layer_change_their_layout():
    rng = np.random.default_rng(0)
    variables = zeros("cvft")
    for name in ("VGG_sat/conv1_2/weights", "sat_conv/biases", "ot_grd_branchot_fc/weights"):
        variables[name] = rng.normal(size=variables[name].shape).astype(np.float32)
    state = official_state(variables, official_model("cvft"), source="a test")
    kernel = variables["VGG_sat/conv1_2/weights"]
    assert state["aerial_trunk.features.2.weight"][5, 7, 1, 2] == kernel[1, 2, 7, 5]
    assert state["transport.cost.weight"][4000, 3] == variables["ot_grd_branchot_fc/weights"][3, 4000]
    assert torch.equal(state["aerial_projection.bias"], torch.from_numpy(variables["sat_conv/biases"]))


def test_what_the_optimizer_left_is_ignored():
    left = [
        "VGG_grd/conv4_1/weights/Adam",
        "VGG_grd/conv4_1/weights/Adam_1",
        "ot_grd_branchot_fc/biases/Adam_1",
        "beta1_power",
        "train/beta2_power",
        "beta1_power_1",
        "global_step",
        "VGG_sat/conv5_1/biases/Momentum",
    ]
    assert weight_names([*left, "grd_conv/weights"]) == ["grd_conv/weights"]
    variables = zeros("cvft") | dict.fromkeys(left, np.zeros(3, np.float32))
    official_state(variables, official_model("cvft"), source="a test")


def test_a_mismatch_is_named_by_its_official_name():
    variables = zeros("cvft")
    del variables["grd_conv/biases"]
    variables["VGG_grd/conv6_1/weights"] = np.zeros((3, 3, 4, 4), np.float32)
    variables["VGG_sat/conv1_1/weights"] = np.zeros((64, 3, 3, 3), np.float32)
    with pytest.raises(CheckpointError) as caught:
        official_state(variables, official_model("cvft"), source="model.ckpt")
    message = str(caught.value)
    assert message.startswith("model.ckpt does not fit the model: ")
    assert "grd_conv/biases is missing" in message
    assert "VGG_grd/conv6_1/weights is unknown" in message
    assert "VGG_sat/conv1_1/weights has shape [64, 3, 3, 3] where [3, 3, 3, 64] is expected" in message


def test_only_the_first_few_mismatches_are_named():
    with pytest.raises(CheckpointError, match=r"is missing, .* is missing, .* is missing and 57 more"):
        official_state({}, official_model("cvft"), source="model.ckpt")


def test_weights_for_another_head_are_refused():
    with pytest.raises(CheckpointError, match=r"ot_grd_branchot_fc/weights is unknown to this model"):
        official_state(zeros("cvft"), official_model("conv"), source="model.ckpt")
