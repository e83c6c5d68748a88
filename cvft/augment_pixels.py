"""What augmentation does to pixels once it is drawn: each function takes one value per pair and has no randomness.

Everything is exact: pixels move by indices, and colours and blur are products of integers that float32 holds exactly,
so that a pair comes out the same to the bit in any batch, on any rank and on any device.

Shape letters: B pairs, H rows, W columns, 3 channels in RGB order.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from cvft.precision import full_precision

_LUMA = (0.299, 0.587, 0.114)  # Rec. 601
_COLOUR_STEPS = 1 << 10  # of a colour matrix's entries: with entries below 16, sums of products stay below 2^24
_TAP_STEPS = 1 << 10  # of a blur's weights
_HALFWAY_STEPS = 1 << 3  # of a grey level between a blur's two passes: 11 bits, which TF32 holds too


def turn_aerial(aerial: Tensor, *, is_mirrored: Tensor, quarter_turns: Tensor) -> Tensor:
    """Mirror left and right where asked, then turn counter-clockwise.

    Args:
        aerial: uint8 [B, H, W, 3], north up; square if anything is turned by an odd number.
        is_mirrored: bool [B]; east becomes west.
        quarter_turns: int64 [B], 0 to 3; one turn brings what was north to the left, where west was.
    """
    height, width = aerial.shape[1:3]
    views = _turned_places(height, width, aerial.device)
    return _take(aerial, views[is_mirrored.long() + 2 * quarter_turns])


def turn_panorama(ground: Tensor, *, is_mirrored: Tensor, quarter_turns: Tensor, shift_px: Tensor) -> Tensor:
    """Do to a panorama what `turn_aerial` does to the aerial image, and roll it further where asked.

    Column u, counted from the left edge of its pixel, has azimuth 360 u / W - 180 degrees. Mirroring negates the
    azimuth, so u becomes W - u: pixel i goes to W - 1 - i, with north in the middle of the width as with north at the
    edge. A counter-clockwise quarter turn of the aerial image lowers every azimuth by 90 degrees: W / 4 columns to the
    left.

    Args:
        ground: uint8 [B, H, W, 3], all 360 degrees.
        is_mirrored: As in `turn_aerial`.
        quarter_turns: As in `turn_aerial`; W must be a multiple of 4 if any is not 0.
        shift_px: int64 [B], columns that it is rolled to the left besides.
    """
    height, width = ground.shape[1:3]
    column = torch.arange(width, device=ground.device)
    column = (column + (quarter_turns * (width // 4) + shift_px)[:, None]) % width
    column = torch.where(is_mirrored[:, None], width - 1 - column, column)
    row = torch.arange(height, device=ground.device) * width
    return _take(ground, (row[:, None] + column[:, None]).flatten(1))


def keep_columns(ground: Tensor, *, first_px: Tensor, num_px: Tensor, fill: Tensor) -> Tensor:
    """Keep a window of each panorama, which may run over its edge, and blank the rest.

    Args:
        ground: uint8 [B, H, W, 3].
        first_px: int64 [B], first column of the window.
        num_px: int64 [B], columns of the window.
        fill: uint8 [3], the colour of the rest.
    """
    width = ground.shape[2]
    place = (torch.arange(width, device=ground.device) - first_px[:, None]) % width
    return torch.where((place < num_px[:, None])[:, None, :, None], ground, fill)


def erase_cells(pixels: Tensor, *, is_erased: Tensor, cell_px: int, fill: Tensor) -> Tensor:
    """Blank square cells.

    Args:
        pixels: uint8 [B, H, W, 3].
        is_erased: bool [B, ceil(H / cell_px), ceil(W / cell_px)].
        cell_px: Side of a cell.
        fill: uint8 [3].
    """
    row, column = (torch.arange(size, device=pixels.device) // cell_px for size in pixels.shape[1:3])
    return torch.where(is_erased[:, row[:, None], column, None], fill, pixels)


def to_planes(pixels: Tensor) -> Tensor:
    """Return float32 [B, 3, H, W] of uint8 [B, H, W, 3], each plane contiguous."""
    return pixels.permute(0, 3, 1, 2).contiguous().float()


def from_planes(planes: Tensor) -> Tensor:
    """Return uint8 [B, H, W, 3] of whole numbers from 0 to 255, [B, 3, H, W]."""
    return planes.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def recolour(planes: Tensor, *, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue_rad: Tensor) -> Tensor:
    """Change colours by one linear map per image, rounded to whole grey levels at its end.

    Args:
        planes: Whole numbers from 0 to 255 in float32, [B, 3, H, W].
        brightness: float64 [B], factor on everything, below 2 as the next two.
        contrast: Factor on the distance from the image's mean grey.
        saturation: Factor on the distance from each pixel's own grey.
        hue_rad: Turn of the colours about the axis of greys.
    """
    luma, unit = _constant(_LUMA, planes.device), torch.eye(3, dtype=torch.float64, device=planes.device)
    # Row by row: a row's sum is a whole number below 2^24, exact in float32, and so is their sum in float64.
    mean = planes.sum(3).double().sum(2) / planes[0, 0].numel() @ luma
    greying = saturation[:, None, None] * unit + (1 - saturation)[:, None, None] * luma
    matrix = (brightness * contrast)[:, None, None] * (greying @ _hue_turn(hue_rad))
    offset = brightness * (1 - contrast) * mean
    steps, offset_steps = ((value * _COLOUR_STEPS).round().float() for value in (matrix, offset))
    with full_precision(planes.device):
        changed = torch.baddbmm(offset_steps[:, None, None], steps, planes.flatten(2))
    return changed.div_(_COLOUR_STEPS).round_().clamp_(0, 255).view_as(planes)


def blur(planes: Tensor, *, sigma_px: Tensor, radius_px: int, is_panorama: bool) -> Tensor:
    """Blur by a Gaussian, cut off at `radius_px` and normalised, with the edge's pixels going on beyond it.

    Args:
        planes: Whole numbers from 0 to 255 in float32, [B, 3, H, W].
        sigma_px: float64 [B]; 0 changes nothing.
        radius_px: Reach of the filter.
        is_panorama: Left and right edges meet.
    """
    num_pairs, _, height, width = planes.shape
    distance = torch.arange(-radius_px, radius_px + 1, dtype=torch.float64, device=planes.device)
    weight = (-((distance / sigma_px.clamp(min=0.01)[:, None]) ** 2) / 2).exp()
    taps = (weight / weight.sum(1, keepdim=True) * _TAP_STEPS).round()
    taps[:, radius_px] += _TAP_STEPS - taps.sum(1)
    kernels = taps.float().repeat_interleave(3, 0)[:, None, None]
    sides, ends = (radius_px, radius_px, 0, 0), (0, 0, radius_px, radius_px)
    with full_precision(planes.device):
        image = planes.view(1, 3 * num_pairs, height, width)
        image = functional.pad(image, sides, mode="circular" if is_panorama else "replicate")
        image = functional.conv2d(image, kernels, groups=3 * num_pairs)
        image = functional.pad(image.div_(_TAP_STEPS / _HALFWAY_STEPS).round_(), ends, mode="replicate")
        image = functional.conv2d(image, kernels.mT.contiguous(), groups=3 * num_pairs)
    return image.div_(_TAP_STEPS * _HALFWAY_STEPS).round_().view_as(planes)


def _take(pixels: Tensor, places: Tensor) -> Tensor:
    """Return uint8 [B, H, W, 3] whose pixel p is pixel `places[b, p]` of the same image; places int64 [B, H * W]."""
    num_pairs, num_px = places.shape
    first = torch.arange(num_pairs, device=pixels.device)[:, None] * num_px
    return pixels.reshape(-1, 3).index_select(0, (places + first).flatten()).view(pixels.shape)


@functools.cache
def _turned_places(height: int, width: int, device: torch.device) -> Tensor:
    """Return where each pixel comes from, int64 [2 or 8, H * W]: mirrored or not, times the turns that are possible."""
    with torch.inference_mode(False):
        upright = torch.arange(height * width, device=device).view(height, width)
        turns = range(4 if height == width else 1)
        views = [torch.rot90(view, turn) for turn in turns for view in (upright, upright.flip(1))]
        return torch.stack([view.flatten() for view in views])


def _hue_turn(angle_rad: Tensor) -> Tensor:
    """Return the rotations [B, 3, 3] about (1, 1, 1) by Rodrigues's formula."""
    cross = _constant((0, -1, 1, 1, 0, -1, -1, 1, 0), angle_rad.device).view(3, 3) / 3**0.5
    cosine, sine = angle_rad.cos()[:, None, None], angle_rad.sin()[:, None, None]
    unit = torch.eye(3, dtype=torch.float64, device=angle_rad.device)
    return cosine * unit + sine * cross + (1 - cosine) / 3


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Keep numbers on the device: copying them there at each step would wait for the device."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float64, device=device)
