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


@pytest.mark.parametrize(
    ("kind", "prefix"), [("cvft", "CVFT"), ("conv", "VGG_conv"), ("global_pool", "VGG_gp")], ids=str
)
@torch.no_grad()
def test_the_official_preset_equals_the_authors_graph(kind, prefix, variables, images):
    ground, aerial = images
    model = official_model(kind, variables)
    with np.load(recipe.VECTORS) as golden:
        ground_descriptor, aerial_descriptor = model(ground, aerial)
        np.testing.assert_allclose(ground_descriptor, golden[f"{prefix}_grd"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(aerial_descriptor, golden[f"{prefix}_sat"], rtol=0, atol=1e-5)
        if kind == "cvft":
            plan = model.ground_transport(ground).plan
            np.testing.assert_allclose(plan, golden["CVFT_plan"], rtol=0, atol=1e-4)


def test_every_golden_array_is_compared_above():
    with np.load(recipe.VECTORS) as golden:
        assert set(golden) == {
            "CVFT_plan",
            *(f"{prefix}_{side}" for prefix in ("CVFT", "VGG_conv", "VGG_gp") for side in ("grd", "sat")),
        }
