"""The prior's geometry against that of the town's renderers, which knows nothing of it."""

import math

import numpy as np
import pytest
import torch

from cvft.config import BackboneConfig, HeadConfig, ModelConfig, PreprocessConfig, TransportConfig
from cvft.errors import ConfigError
from cvft.feature_transport import FeatureTransport
from cvft.model import build_model
from cvft.ops import LegacyBilinearResize
from cvft.polar_prior import centres, polar_terms
from pipeline.synthetic.geometry import AerialGeometry, PanoramaGeometry

GROUND_MAP, GRID = (4, 20), (8, 8)
PANORAMA, AERIAL = PanoramaGeometry(), AerialGeometry()


def predicted_pixels(source_grid):
    """Where on the aerial image the town's geometry has the bearing of a column at the distance of a row."""
    pixels = []
    for row in centres(GROUND_MAP[0], source_grid[0]).double().numpy():
        for column in centres(GROUND_MAP[1], source_grid[1]).double().numpy():
            azimuth, _ = PANORAMA.direction_of(column * PANORAMA.width_px, 0.0)
            distance = (1 - row) * AERIAL.extent_m / 2
            east, north = distance * math.sin(math.radians(azimuth)), distance * math.cos(math.radians(azimuth))
            pixels.append([float(part) for part in AERIAL.pixel_of(east, north)])
    return np.array(pixels)


@pytest.mark.parametrize("source_grid", [GROUND_MAP, GRID], ids=["map", "resized"])
def test_the_terms_are_the_squared_distances_of_the_towns_geometry(source_grid):
    pixels = predicted_pixels(source_grid)
    middles = (np.arange(8) + 0.5) * AERIAL.size_px / 8
    expected = np.zeros((len(pixels), 64))
    for source, (column, row) in enumerate(pixels):
        for cell in range(64):
            across, down = middles[cell % 8] - column, middles[cell // 8] - row
            expected[source, cell] = (across**2 + down**2) / (AERIAL.size_px / 2) ** 2
    terms = polar_terms(GROUND_MAP, source_grid, GRID)
    assert (terms > -1e-6).all()
    np.testing.assert_allclose(terms.sum(0), expected, rtol=0, atol=1e-5)


def test_a_resized_position_lies_where_the_resize_reads_it():
    ramp = (torch.arange(20) + 0.5).repeat(4, 1)[None, None] / 20
    resized = LegacyBilinearResize(GROUND_MAP, GRID)(ramp)[0, 0, 0]
    torch.testing.assert_close(centres(20, 8), resized)


def test_a_strong_prior_moves_every_position_of_the_ground_towards_its_bearing():
    torch.manual_seed(0)
    config = TransportConfig(init="zero", is_rectangular=True, polar_weight=50.0, num_iterations=500)
    plan = FeatureTransport(config, channels=4, grid=GRID, ground_map=GROUND_MAP).plan(torch.rand(1, 4, *GROUND_MAP))[0]
    down, right = torch.meshgrid(*[(torch.arange(8) + 0.5) / 4 - 1] * 2, indexing="ij")
    east, north = (plan @ part.reshape(-1, 1) for part in (right, -down))
    arrived = torch.atan2(east, north).reshape(GROUND_MAP)
    meant = (torch.arange(20) + 0.5) / 20 * 2 * math.pi - math.pi
    turned = torch.remainder(arrived - meant + math.pi, 2 * math.pi) - math.pi
    assert turned.abs().max() < math.radians(15)  # a column spans 18 degrees


def test_the_weights_are_learned_and_start_as_given():
    torch.manual_seed(0)
    config = TransportConfig(init="zero", epsilon=0.1, polar_weight=5.0, num_groups=2)
    transport = FeatureTransport(config, channels=4, grid=GRID, ground_map=GROUND_MAP)
    given = torch.rand(1, 4, *GRID)
    cost = transport._cost(given)
    with torch.no_grad():
        transport.polar_weight.zero_()
    added = (cost - transport._cost(given)) / config.epsilon  # in units of epsilon
    torch.testing.assert_close(added, 5 * polar_terms(GROUND_MAP, GRID, GRID).sum(0).repeat(2, 1, 1), rtol=0, atol=1e-4)
    transport(given).square().sum().backward()
    assert (transport.polar_weight.grad != 0).all()


def test_a_prior_for_an_aerial_image_that_is_unrolled_is_refused():
    preprocess = PreprocessConfig(ground_size_px=(32, 80), aerial_size_px=(64, 64), polar=True)
    head = HeadConfig(channels=4, grid=(1, 3), transport=TransportConfig(init="zero", polar_weight=1.0))
    with pytest.raises(ConfigError, match=r"polar_weight: the prior leads to .* which preprocess\.polar unrolls"):
        build_model(ModelConfig(backbone=BackboneConfig(width=1 / 16), head=head), preprocess)
