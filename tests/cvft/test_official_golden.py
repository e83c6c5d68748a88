"""The official graph, number for number: every array that the authors' own TensorFlow graph gave."""

import numpy as np
import pytest
import torch

from cvft.config import HeadConfig, ModelConfig, PreprocessConfig
from cvft.model import CrossViewModel
from cvft.official import official_state
from tests.golden import recipe


@pytest.fixture(scope="module")
def variables():
    return recipe.variables("cvft")


@pytest.fixture(scope="module")
def images():
    return tuple(torch.from_numpy(image).permute(0, 3, 1, 2) for image in recipe.images())


def official_model(kind, variables):
    model = CrossViewModel(ModelConfig(head=HeadConfig(kind=kind)), PreprocessConfig())
    own = {name: variables[name] for name in recipe.variable_shapes(kind)}
    model.load_state_dict(official_state(own, model, source="the recipe"))
    return model.eval()


# Head -> the golden arrays that it must give: ground descriptors, aerial descriptors, plan.
ARRAYS = {
    "cvft": ("CVFT_grd", "CVFT_sat", "CVFT_plan"),
    "conv": ("VGG_conv_grd", "VGG_conv_sat"),
    "global_pool": ("VGG_gp_grd", "VGG_gp_sat"),
}
TOLERANCES = (1e-5, 1e-5, 1e-4)


@pytest.mark.parametrize("kind", ARRAYS)
@torch.no_grad()
def test_the_official_preset_equals_the_authors_graph(kind, variables, images):
    ground, aerial = images
    model = official_model(kind, variables)
    found = model(ground, aerial)
    if kind == "cvft":
        found = (*found, model.ground_transport(ground).plan)
    with np.load(recipe.VECTORS) as golden:
        for array, name, tolerance in zip(found, ARRAYS[kind], TOLERANCES, strict=False):
            np.testing.assert_allclose(array, golden[name], rtol=0, atol=tolerance, err_msg=name)
    assert len(found) == len(ARRAYS[kind])


def test_every_golden_array_is_compared_above():
    with np.load(recipe.VECTORS) as golden:
        assert sorted(golden) == sorted(name for names in ARRAYS.values() for name in names)
