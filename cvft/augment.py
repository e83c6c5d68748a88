"""Augmentation of training pairs on the device where the network is: the two views change together or each for itself.

Every choice is a function of the pair's noise (`cvft.noise`), so of (seed, step, pair): N ranks, a second forward pass
and a resumed training see the same pixels, to the bit.

The geometry is the town's and CVUSA's: the aerial image has north up and the camera in its middle; the panorama shows
360 degrees with north in the middle of its width and east right of it.

Shape letters: B pairs, H rows, W columns, 3 channels in RGB order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cvft.augment_pixels import (
    blur,
    erase_cells,
    from_planes,
    keep_columns,
    recolour,
    to_planes,
    turn_aerial,
    turn_panorama,
)
from cvft.batch import Batch
from cvft.config import PreprocessConfig
from cvft.configuration import require
from cvft.noise import derive, dropout, pair_noise

_CELLS_PER_HEIGHT = 8  # of those that `erase` blanks
_ERASED_SHARE = 0.25
_WORD = 1 << 32

# The places of the draws: those of a pair, and those of each of its views.
_PAIR, _GROUND, _AERIAL = 101, 102, 103
_MIRROR, _TURN, _HEADING, _FOV = range(4)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _BLUR, _SIGMA, _ERASE, _CELLS = range(8)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is changed at random in a training pair; nothing by default.

    Attributes:
        flip: Probability that both views are mirrored, east to west.
        rotate: Probability that the aerial image is turned by one, two or three quarter turns and the panorama rolled
            with it; at 0.75 all four directions are alike.
        brightness: Each view's colours are multiplied by a factor from [1 - x, 1 + x].
        contrast: Likewise their distance from the view's mean grey.
        saturation: Likewise their distance from each pixel's own grey.
        hue_deg: Each view's colours are turned about the axis of greys by an angle from [-x, x].
        blur: Probability that a view is blurred, each for itself.
        blur_sigma_px: Largest standard deviation of that blur.
        erase: Probability that a view loses a quarter of its square cells, each for itself; a cell's side is an eighth
            of the view's height.
        fov_deg: Smallest and largest field of view of a panorama, whose other columns are blanked with the mean; the
            window stays at its bearings, which are drawn, unless the orientation is unknown.
        is_orientation_unknown: Roll the panorama by any number of columns and leave the aerial image as it is; the
            window of a limited field of view is then in the middle.
    """

    flip: float = 0.0
    rotate: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue_deg: float = 0.0
    blur: float = 0.0
    blur_sigma_px: float = 1.5
    erase: float = 0.0
    fov_deg: tuple[float, float] = (360.0, 360.0)
    is_orientation_unknown: bool = False

    def __post_init__(self) -> None:
        for name in ("flip", "rotate", "blur", "erase"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name}: {value} is a probability and must lie in [0, 1]")
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name}: {value} must lie in [0, 1)")
        require(0 <= self.hue_deg <= 180, f"hue_deg: {self.hue_deg} must lie in [0, 180]")
        require(0 < self.blur_sigma_px <= 5, f"blur_sigma_px: {self.blur_sigma_px} must lie in (0, 5]")
        low, high = self.fov_deg
        require(0 < low <= high <= 360, f"fov_deg: {[low, high]} must be a smallest and a largest angle up to 360")

    def require_fits(self, preprocess: PreprocessConfig) -> None:
        """Refuse images that cannot be turned by quarters.

        Raises:
            ConfigError: The aerial image is not square, or the panorama's width is no multiple of 4.
        """
        if self.rotate == 0:
            return
        width, (height, aerial_width) = preprocess.ground_size_px[1], preprocess.aerial_size_px
        require(
            width % 4 == 0,
            f"train.augment.rotate: a quarter of the panorama is no whole number of its {width} columns; "
            "set preprocess.ground_size_px to a multiple of 4, or train.augment.rotate=0",
        )
        require(
            height == aerial_width,
            f"train.augment.rotate: an aerial image of {height}x{aerial_width} px cannot be turned by a quarter; "
            "set preprocess.aerial_size_px to a square, or train.augment.rotate=0",
        )

    @property
    def has_turns(self) -> bool:
        """Whether both views are mirrored or turned together."""
        return self.flip > 0 or self.rotate > 0

    @property
    def has_limited_view(self) -> bool:
        """Whether some of the panorama is blanked."""
        return self.fov_deg[0] < 360

    @property
    def has_colours(self) -> bool:
        """Whether colours change."""
        return max(self.brightness, self.contrast, self.saturation, self.hue_deg) > 0


class Augment:
    """Applies an `AugmentConfig`: mirrors and turns first, then colours, blur, field of view and erased cells."""

    def __init__(self, config: AugmentConfig, preprocess: PreprocessConfig) -> None:
        """Prepare for images of one size.

        Args:
            config: What changes.
            preprocess: Gives the sizes, and the mean that blanked pixels get.

        Raises:
            ConfigError: These images cannot be turned.
        """
        config.require_fits(preprocess)
        self.config = config
        mean = preprocess.mean if preprocess.channel_order == "rgb" else preprocess.mean[::-1]
        self._fill = tuple(min(max(round(value), 0), 255) for value in mean)

    def __call__(self, ground: Tensor, aerial: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return both views of the pairs, changed; the given ones are left as they are.

        Args:
            ground: uint8 [B, H, W, 3].
            aerial: uint8 [B, H, W, 3].
            noise: int32 [B], the pairs' noise at this step (`pair_noise`).
        """
        ground, aerial, first_px = self._turned(ground, aerial, derive(noise, _PAIR))
        ground = self._jittered(ground, derive(noise, _GROUND), is_panorama=True)
        aerial = self._jittered(aerial, derive(noise, _AERIAL), is_panorama=False)
        if self.config.has_limited_view:
            low, high = self.config.fov_deg
            width = ground.shape[2]
            fov = low + (high - low) * _uniform(derive(noise, _PAIR), _FOV)
            num_px = (fov * width / 360).round().clamp(min=1).long()
            if self.config.is_orientation_unknown:
                first_px = (width - num_px) // 2
            ground = keep_columns(ground, first_px=first_px, num_px=num_px, fill=self._fill_on(ground))
        return self._erased(ground, derive(noise, _GROUND)), self._erased(aerial, derive(noise, _AERIAL))

    def of_batch(self, batch: Batch, *, seed: int, step: int) -> Batch:
        """Return a batch with its views changed as (seed, step, pair) decide."""
        ground, aerial = self(batch.ground, batch.aerial, pair_noise(batch.index, seed=seed, step=step))
        return dataclasses.replace(batch, ground=ground, aerial=aerial)

    def _turned(self, ground: Tensor, aerial: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return both views and the column that is drawn for the camera's heading, int64 [B]."""
        config = self.config
        heading_px = (_uniform(noise, _HEADING) * ground.shape[2]).long()
        is_mirrored = _uniform(noise, _MIRROR) < config.flip
        draw = _uniform(noise, _TURN)
        turns = torch.where(draw < config.rotate, 1 + (draw / max(config.rotate, 1e-300) * 3).long(), 0)
        if config.has_turns:
            aerial = turn_aerial(aerial, is_mirrored=is_mirrored, quarter_turns=turns)
        if config.has_turns or config.is_orientation_unknown:
            shift_px = heading_px if config.is_orientation_unknown else torch.zeros_like(heading_px)
            ground = turn_panorama(ground, is_mirrored=is_mirrored, quarter_turns=turns, shift_px=shift_px)
        return ground, aerial, heading_px

    def _jittered(self, pixels: Tensor, noise: Tensor, *, is_panorama: bool) -> Tensor:
        config = self.config
        if not (config.has_colours or config.blur > 0):
            return pixels
        planes = to_planes(pixels)
        if config.has_colours:
            planes = recolour(
                planes,
                brightness=1 + config.brightness * _balanced(noise, _BRIGHTNESS),
                contrast=1 + config.contrast * _balanced(noise, _CONTRAST),
                saturation=1 + config.saturation * _balanced(noise, _SATURATION),
                hue_rad=math.radians(config.hue_deg) * _balanced(noise, _HUE),
            )
        if config.blur > 0:
            sigma = _uniform(noise, _SIGMA) * config.blur_sigma_px * (_uniform(noise, _BLUR) < config.blur)
            radius = math.ceil(3 * config.blur_sigma_px)
            planes = blur(planes, sigma_px=sigma, radius_px=radius, is_panorama=is_panorama)
        return from_planes(planes)

    def _erased(self, pixels: Tensor, noise: Tensor) -> Tensor:
        if self.config.erase == 0:
            return pixels
        height, width = pixels.shape[1:3]
        cell_px = max(1, height // _CELLS_PER_HEIGHT)
        rows, columns = -(-height // cell_px), -(-width // cell_px)
        cells = torch.ones(len(pixels), 1, rows, columns, device=pixels.device)
        is_drawn = dropout(cells, _ERASED_SHARE, derive(noise, _CELLS))[:, 0] == 0
        is_erased = is_drawn & (_uniform(noise, _ERASE) < self.config.erase)[:, None, None]
        return erase_cells(pixels, is_erased=is_erased, cell_px=cell_px, fill=self._fill_on(pixels))

    def _fill_on(self, pixels: Tensor) -> Tensor:
        return _constant(self._fill, pixels.device)


def _uniform(noise: Tensor, place: int) -> Tensor:
    """Return float64 [B] in [0, 1)."""
    return (derive(noise, place).double() + _WORD // 2) / _WORD


def _balanced(noise: Tensor, place: int) -> Tensor:
    """Return float64 [B] in [-1, 1)."""
    return 2 * _uniform(noise, place) - 1


@functools.cache
def _constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Keep a colour on the device: copying it there at each step would wait for the device."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.uint8, device=device)
