"""Augmentation: off changes nothing, each option changes what it says, and the same everywhere for the same pair."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cvft.augment import Augment, AugmentConfig
from cvft.augment_pixels import blur, from_planes, recolour, to_planes, turn_aerial, turn_panorama
from cvft.config import PreprocessConfig
from cvft.errors import ConfigError
from cvft.noise import pair_noise

SIZES = PreprocessConfig(ground_size_px=(16, 64), aerial_size_px=(32, 32))
EVERYTHING = AugmentConfig(
    flip=0.5,
    rotate=0.75,
    brightness=0.3,
    contrast=0.3,
    saturation=0.4,
    hue_deg=20.0,
    blur=0.5,
    erase=0.5,
    fov_deg=(90.0, 270.0),
    is_orientation_unknown=True,
)
NUM_PAIRS = 64
FILL = torch.tensor([124, 117, 104])


def _views(num_pairs=NUM_PAIRS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = SIZES.ground_size_px, SIZES.aerial_size_px
    return [torch.randint(256, (num_pairs, *size, 3), dtype=torch.uint8, generator=generator) for size in sizes]


def _noise(num_pairs=NUM_PAIRS, step=0):
    return pair_noise(torch.arange(num_pairs), seed=0, step=step)


def _augmented(noise=None, views=None, **options):
    noise = _noise() if noise is None else noise
    return Augment(AugmentConfig(**options), SIZES)(*(views or _views(len(noise))), noise)


def test_by_default_nothing_is_changed_to_the_bit():
    views = _views()
    assert all(torch.equal(found, given) for found, given in zip(_augmented(), views, strict=True))


def test_the_given_pixels_are_left_as_they_are():
    views, before = _views(), _views()
    found = Augment(EVERYTHING, SIZES)(*views, _noise())
    assert all(torch.equal(given, old) for given, old in zip(views, before, strict=True))
    assert all((new != old).any() for new, old in zip(found, before, strict=True))
    assert all(new.dtype == torch.uint8 and new.shape == old.shape for new, old in zip(found, before, strict=True))


def test_a_pair_is_the_same_in_any_batch_and_another_at_another_step():
    views, noise, augment = _views(), _noise(), Augment(EVERYTHING, SIZES)
    whole = augment(*views, noise)
    rows = torch.tensor([17, 3, 40])
    for part in (rows, rows[:1], torch.arange(5, 60)):
        found = augment(*(view[part] for view in views), noise[part])
        assert all(torch.equal(found[k], whole[k][part]) for k in (0, 1))
    torch.manual_seed(1)  # no generator has a say
    assert all(torch.equal(again, old) for again, old in zip(augment(*views, noise), whole, strict=True))
    others = augment(*views, _noise(step=1))
    assert all((other != old).flatten(1).any(1).all() for other, old in zip(others, whole, strict=True))


def test_flip_mirrors_both_views_of_half_of_the_pairs():
    ground, aerial = _views(400)
    found = _augmented(_noise(400), flip=0.5)
    is_flipped = [(new == old.flip(2)).flatten(1).all(1) for new, old in zip(found, (ground, aerial), strict=True)]
    is_kept = [(new == old).flatten(1).all(1) for new, old in zip(found, (ground, aerial), strict=True)]
    assert torch.equal(*is_flipped)
    assert torch.equal(is_kept[0], ~is_flipped[0])
    assert torch.equal(is_kept[1], ~is_flipped[1])
    assert 160 < is_flipped[0].sum() < 240


def test_rotate_turns_the_aerial_image_and_rolls_the_panorama_by_as_many_quarters():
    ground, aerial = _views(400)
    found = _augmented(_noise(400), rotate=0.75)
    counts = []
    for turns in range(4):
        rolled, turned = ground.roll(-16 * turns, dims=2), torch.rot90(aerial, turns, dims=(1, 2))
        is_rolled, is_turned = (
            (new == old).flatten(1).all(1) for new, old in zip(found, (rolled, turned), strict=True)
        )
        assert torch.equal(is_rolled, is_turned)
        counts.append(int(is_turned.sum()))
    assert sum(counts) == 400
    assert min(counts) > 70


def test_mirror_comes_before_the_turn_in_both_views():
    ground, aerial = _views(8)
    is_mirrored, turns = torch.arange(8) % 2 == 1, torch.arange(8) // 2
    turned = turn_aerial(aerial, is_mirrored=is_mirrored, quarter_turns=turns)
    rolled = turn_panorama(ground, is_mirrored=is_mirrored, quarter_turns=turns, shift_px=torch.full((8,), 5))
    for row in range(8):
        first, second = (view[row].flip(1) if is_mirrored[row] else view[row] for view in (ground, aerial))
        assert torch.equal(turned[row], torch.rot90(second, int(turns[row])))
        assert torch.equal(rolled[row], first.roll(-16 * int(turns[row]) - 5, dims=1))


@pytest.mark.parametrize("option", ["brightness", "contrast", "saturation", "hue_deg", "blur", "erase"])
def test_colours_blur_and_erasing_are_drawn_for_each_view_and_move_no_pixel(option):
    """Both views show the same stripes, so that what differs between them is the draw."""
    stripes = torch.randint(256, (32, 1, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    view = stripes.expand(NUM_PAIRS, 32, 32, 3).contiguous()
    found = _augmented(views=[view, view], **{option: 30.0 if option == "hue_deg" else 0.5})
    changed = [(new != view).flatten(1).any(1) for new in found]
    assert all(part.float().mean() > 0.3 for part in changed)
    assert ((found[0] != found[1]).flatten(1).any(1)).float().mean() > 0.3
    if option in ("blur", "erase"):
        assert not torch.equal(*changed)
    if option != "erase":
        assert all((new == new[:, :, :1]).all() for new in found)  # columns are still alike


def test_brightness_contrast_and_saturation_are_what_their_words_say():
    """Against the formulas in float64, one after the other; here all is rounded once, from coefficients of 1/1024."""
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(0, 256, (5, 9, 7, 3), dtype=np.uint8))
    b, c, s, h = (torch.from_numpy(random.uniform(low, high, 5)) for low, high in ((0.6, 1.6),) * 3 + ((-3.1, 3.1),))
    found = from_planes(recolour(to_planes(pixels), brightness=b, contrast=c, saturation=s, hue_rad=h))
    luma = np.array([0.299, 0.587, 0.114])
    expected = []
    for image, factors, angle in zip(pixels.numpy().astype(float), zip(b, c, s, strict=True), h, strict=True):
        brightness, contrast, saturation = (float(factor) for factor in factors)
        axis, turn = np.ones(3) / np.sqrt(3), float(angle)
        turned = (
            image * np.cos(turn)
            + np.cross(axis, image) * np.sin(turn)
            + axis * (image @ axis)[..., None] * (1 - np.cos(turn))
        )
        grey = (turned @ luma)[..., None]
        saturated = grey + saturation * (turned - grey)
        mean = (image @ luma).mean()
        expected.append(brightness * (mean + contrast * (saturated - mean)))
    difference = np.abs(found.numpy() - np.clip(expected, 0, 255))
    assert difference.max() < 1.2
    unchanged = recolour(to_planes(pixels), brightness=b / b, contrast=c / c, saturation=s / s, hue_rad=h * 0)
    assert torch.equal(from_planes(unchanged), pixels)


def test_blur_is_the_gaussian_with_joined_edges_in_the_panorama_alone():
    pixels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (4, 21, 30, 3), dtype=np.uint8))
    sigmas = torch.tensor([0.0, 0.4, 1.0, 1.5], dtype=torch.float64)
    offsets = np.arange(-5, 6)
    for is_panorama in (False, True):
        blurred = blur(to_planes(pixels), sigma_px=sigmas, radius_px=5, is_panorama=is_panorama)
        found = from_planes(blurred).numpy().astype(float)
        assert np.array_equal(found[0], pixels[0].numpy())
        for image, sigma, result in zip(pixels.numpy()[1:].astype(float), sigmas[1:], found[1:], strict=True):
            weights = np.exp(-(offsets**2) / (2 * float(sigma) ** 2))
            weights /= weights.sum()
            padded = np.pad(image, ((0, 0), (5, 5), (0, 0)), mode="wrap" if is_panorama else "edge")
            wide = sum(weight * padded[:, 5 + k : 35 + k] for weight, k in zip(weights, offsets, strict=True))
            padded = np.pad(wide, ((5, 5), (0, 0), (0, 0)), mode="edge")
            expected = sum(weight * padded[5 + k : 26 + k] for weight, k in zip(weights, offsets, strict=True))
            assert np.abs(result - expected).max() < 1.2


def test_a_limited_field_of_view_keeps_a_window_at_its_bearings_and_blanks_the_rest_with_the_mean():
    views = _views()
    ground, aerial = _augmented(views=views, fov_deg=(90.0, 90.0))
    assert torch.equal(aerial, views[1])
    is_kept = (ground == views[0]).all(3).all(1)
    assert (is_kept.sum(1) == 16).all()
    assert (ground.permute(0, 2, 1, 3)[~is_kept] == FILL).all()
    # One window, which may run over the edge: it begins once.
    begins = is_kept & ~is_kept.roll(1, dims=1)
    assert (begins.sum(1) == 1).all()
    assert len(begins.int().argmax(1).unique()) > 25


def test_fields_of_view_are_drawn_between_the_two_angles():
    views = _views(400)
    ground, _ = _augmented(_noise(400), views, fov_deg=(90.0, 180.0))
    widths = (ground == views[0]).all(3).all(1).sum(1)
    assert (widths.min(), widths.max()) == (16, 32)
    assert len(widths.unique()) == 17


def test_unknown_orientation_rolls_the_panorama_alone_by_any_number_of_columns():
    views = _views(400)
    ground, aerial = _augmented(_noise(400), views, is_orientation_unknown=True)
    assert torch.equal(aerial, views[1])
    matches = torch.stack([(ground == views[0].roll(-k, dims=2)).flatten(1).all(1) for k in range(64)], dim=1)
    assert (matches.sum(1) == 1).all()
    assert len(matches.int().argmax(1).unique()) > 60


def test_unknown_orientation_with_a_limited_view_looks_to_the_middle():
    views = _views()
    rolled, _ = _augmented(views=views, is_orientation_unknown=True)
    ground, _ = _augmented(views=views, is_orientation_unknown=True, fov_deg=(90.0, 90.0))
    assert torch.equal(ground[:, :, 24:40], rolled[:, :, 24:40])
    assert (ground[:, :, :24] == FILL).all()
    assert (ground[:, :, 40:] == FILL).all()


def test_erasing_blanks_about_a_quarter_of_the_square_cells():
    views = [view // 3 for view in _views(200)]  # none has the mean's colour
    for new, old, cell_px in zip(_augmented(_noise(200), views, erase=1.0), views, (2, 4), strict=True):
        is_blank = (new == FILL).all(3) & (new != old).any(3)
        share = is_blank.float().mean((1, 2))
        assert share.mean().item() == pytest.approx(0.25, abs=0.02)
        assert torch.equal(new[~is_blank], old[~is_blank])
        cells = (new == FILL).all(3).float().unfold(1, cell_px, cell_px).unfold(2, cell_px, cell_px).mean((3, 4))
        assert set(cells.unique().tolist()) <= {0.0, 1.0}


def test_the_blank_colour_is_the_mean_in_rgb_order_and_vanishes_after_preprocessing():
    other = replace(SIZES, channel_order="rgb", mean=(10.2, 20.4, 30.6))
    blank = AugmentConfig(fov_deg=(1.0, 1.0))
    ground, _ = Augment(blank, other)(*_views(), _noise())
    assert (ground == torch.tensor([10, 20, 31])).all(3).float().mean() > 0.98


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, r"^flip: 1.5 is a probability"),
        ({"brightness": 1.0}, r"^brightness: 1.0 must lie in \[0, 1\)"),
        ({"hue_deg": -1.0}, r"^hue_deg: -1.0 must lie in"),
        ({"blur_sigma_px": 0.0}, r"^blur_sigma_px: 0.0 must lie in"),
        ({"fov_deg": (90.0, 70.0)}, r"^fov_deg: \[90.0, 70.0\] must be a smallest and a largest angle"),
    ],
)
def test_impossible_values_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        AugmentConfig(**options)


def test_images_that_cannot_be_turned_by_quarters_are_refused_in_one_line():
    for sizes, message in (
        (PreprocessConfig(ground_size_px=(16, 62)), "no whole number of its 62 columns"),
        (PreprocessConfig(aerial_size_px=(32, 40)), "an aerial image of 32x40 px cannot be turned"),
    ):
        with pytest.raises(ConfigError, match=f"^train.augment.rotate: .*{message}.*") as error:
            Augment(AugmentConfig(rotate=0.5), sizes)
        assert "\n" not in str(error.value)
        Augment(AugmentConfig(flip=0.5), sizes)
