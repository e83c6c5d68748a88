"""The polar transform against a loop over pixels, and against the augmentation's geometry."""

import math

import numpy as np
import pytest
import torch

from cvft.augment_pixels import turn_aerial, turn_panorama
from cvft.checkpoint import CheckpointInfo, load_model
from cvft.config import BackboneConfig, HeadConfig, ModelConfig, PreprocessConfig
from cvft.configuration import parse, to_plain
from cvft.errors import CheckpointError, ConfigError
from cvft.model import CrossViewModel, build_model
from cvft.polar_transform import PolarTransform
from cvft.preprocess import Preprocess
from cvft.snapshot import save_checkpoint

SIZES = PreprocessConfig(ground_size_px=(32, 96), aerial_size_px=(64, 64), std=(64.0, 64.0, 64.0), polar=True)
BACKBONE = BackboneConfig(blocks=(1, 1, 1), width=0.125, num_frozen_blocks=1, dropout=0.0)
NETWORK = ModelConfig(backbone=BACKBONE, head=HeadConfig(kind="conv", channels=4, grid=(4, 12)))


def _aerials(num=2, size=(64, 64)):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (num, *size, 3), dtype=np.uint8))


def _planes(pixels):
    return pixels.permute(0, 3, 1, 2).double()


def _sampled(image, right, down):
    """Return the value at a continuous place, pixel i covering [i, i + 1), edges going on."""
    height, width = image.shape
    column, row = right - 0.5, down - 0.5
    left, top = math.floor(column), math.floor(row)
    value = 0.0
    for i, share_i in ((top, 1 - (row - top)), (top + 1, row - top)):
        for j, share_j in ((left, 1 - (column - left)), (left + 1, column - left)):
            value += share_i * share_j * image[min(max(i, 0), height - 1), min(max(j, 0), width - 1)]
    return value


@pytest.mark.parametrize("size", [(64, 64), (40, 56)])
def test_each_pixel_is_the_aerial_image_at_its_bearing_and_distance(size):
    aerial = _planes(_aerials(1, size))
    height, width = 9, 22
    found = PolarTransform((height, width))(aerial)
    for row in range(height):
        distance = 1 - (row + 0.5) / height
        for column in range(width):
            azimuth = 2 * math.pi * ((column + 0.5) / width - 0.5)
            right = size[1] / 2 * (1 + distance * math.sin(azimuth))
            down = size[0] / 2 * (1 - distance * math.cos(azimuth))
            expected = _sampled(aerial[0, 1].numpy(), right, down)
            assert found[0, 1, row, column].item() == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(("is_mirrored", "turns"), [(True, 0), (False, 1), (False, 2), (False, 3), (True, 3)])
@pytest.mark.parametrize("width", [96, 100])
def test_unrolling_the_turned_aerial_image_is_rolling_the_unrolled_one(is_mirrored, turns, width):
    """So the panorama that matches rolls in the same way: augmentation and polar transform share one geometry."""
    unroll, aerial = PolarTransform((32, width)), _aerials()
    change = {"is_mirrored": torch.tensor([is_mirrored] * 2), "quarter_turns": torch.tensor([turns] * 2)}
    found = unroll(_planes(turn_aerial(aerial, **change)))
    unrolled = unroll(_planes(aerial)).permute(0, 2, 3, 1)
    # Whole numbers, so that the panorama's function, which takes bytes, can move them: each pixel's own number.
    place = torch.arange(32 * width).view(1, 32, width, 1).expand(2, -1, -1, 3)
    digits = [(place // 256**k % 256).byte() for k in (0, 1)]
    moved = [turn_panorama(digit, **change, shift_px=torch.zeros(2, dtype=torch.int64)).long() for digit in digits]
    order = (moved[0] + 256 * moved[1])[0, :, :, 0].flatten()
    expected = unrolled.reshape(2, 32 * width, 3)[:, order].view(2, 32, width, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_it_makes_no_difference_whether_pixels_are_normalised_before_or_after():
    pixels, unroll = _aerials(), PolarTransform((32, 96))
    before = unroll(Preprocess(SIZES)(pixels))
    raw = unroll(pixels.permute(0, 3, 1, 2).float()).flip(1)
    after = (raw - torch.tensor(SIZES.mean).view(3, 1, 1)) / torch.tensor(SIZES.std).view(3, 1, 1)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-5)
    assert before.is_contiguous(memory_format=torch.channels_last)


def test_the_network_unrolls_by_itself_and_has_no_more_weights():
    torch.manual_seed(0)
    model = build_model(NETWORK, SIZES).eval()
    plain = CrossViewModel(NETWORK, PreprocessConfig(ground_size_px=(32, 96), aerial_size_px=(32, 96))).eval()
    plain.load_state_dict(model.state_dict())  # strict: the same names
    pixels = Preprocess(SIZES)(_aerials())
    with torch.no_grad():
        found, expected = model.embed_aerial(pixels), plain.embed_aerial(PolarTransform((32, 96))(pixels))
    assert torch.equal(found, expected)
    assert found.shape == (2, 4 * 4 * 12)


def test_the_grid_of_an_unrolled_image_is_the_panoramas():
    square = ModelConfig(backbone=BACKBONE, head=HeadConfig(kind="conv", channels=4, grid=(8, 8)))
    with pytest.raises(ConfigError, match=r"not the map \[4, 12\] .*preprocess.ground_size_px where preprocess.polar"):
        build_model(square, SIZES)


def test_it_is_stored_with_the_weights_and_not_changed_in_silence(tmp_path):
    older = {name: value for name, value in to_plain(PreprocessConfig()).items() if name != "polar"}
    assert parse(PreprocessConfig, older) == PreprocessConfig(polar=False)
    save_checkpoint(
        tmp_path / "it", model=build_model(NETWORK, SIZES), info=CheckpointInfo(model=NETWORK, preprocess=SIZES)
    )
    model, info = load_model(tmp_path / "it")
    assert info.preprocess.polar
    assert model.polar is not None
    other = PreprocessConfig(ground_size_px=(32, 96), aerial_size_px=(32, 96), std=SIZES.std)
    with pytest.raises(CheckpointError, match="polar"):
        load_model(tmp_path / "it", preprocess=other)
