"""The texture of the ground and of forests, anchored to the world so that neighbouring places show the same.

Shapes: S = canvas size. An origin is the (row, column) of a canvas's corner in the plane of textures.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic.light import FIELDS, ROUGHNESS
from pipeline.synthetic.noise import noise_tile
from pipeline.synthetic.scene import Material

F32 = NDArray[np.float32]
_TILE = 512
_FURROW_M = 1.9


@lru_cache(maxsize=2)
def _repeated(tag: str, *, size: int) -> F32:
    tile = canopy_tile() if tag == "canopy" else noise_tile(tag, size=_TILE)
    times = -(-size // _TILE) + 1
    return np.tile(tile, (times, times))


def _window(tag: str, *, size: int, origin: tuple[int, int]) -> F32:
    row, column = (value % _TILE for value in origin)
    return _repeated(tag, size=size)[row : row + size, column : column + size]


@lru_cache(maxsize=1)
def canopy_tile() -> F32:
    """Return the tops of a closed forest as a tileable relief in 0..1.2: crowns beside and over each other."""
    tile = np.zeros((_TILE, _TILE), np.float32)
    places = noise_tile("crowns", size=32, roughness=0.0)
    size = 29
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    dome = np.sqrt(np.clip(1 - x**2 - y**2, 0, None)).astype(np.float32)
    for k in range(32 * 32):
        row, column = divmod(k, 32)
        rows = (np.arange(size) + row * 16 + int(6 * places[column, row]) - size // 2) % _TILE
        columns = (np.arange(size) + column * 16 + int(6 * places[row, (column + 7) % 32]) - size // 2) % _TILE
        area = np.ix_(rows, columns)
        tile[area] = np.maximum(tile[area], np.where(dome > 0, 0.35 + 0.16 * places[row, column] + 0.45 * dome, 0))
    tile += 0.05 * noise_tile("twigs", size=_TILE, roughness=0.4)
    return tile.clip(0, 1.2)


def texture_of(labels: NDArray[np.uint8], *, origin: tuple[int, int], px_per_m: float, out: F32) -> None:
    """Write the factor on the albedo of every pixel of a canvas [S, S] into `out`."""
    size = len(labels)
    roughness = cv2.LUT(labels, _roughness_table())
    cv2.multiply(roughness, _window("ground", size=size, origin=origin), dst=out, scale=1 / 1000, dtype=cv2.CV_32F)
    out += 1
    present = np.bincount(labels[::4, ::4].ravel(), minlength=len(Material)) > 0
    for material in FIELDS:
        if present[material]:
            _furrow(labels == material, out, origin=origin, px_per_m=px_per_m, turn=0.8 * material)
    if present[Material.WOOD]:
        crowns = 0.35 + 0.95 * _window("canopy", size=size, origin=origin)
        np.multiply(out, crowns, out=out, where=labels == Material.WOOD)


def _roughness_table() -> NDArray[np.uint8]:
    """Return the texture's strength on every label in thousandths, [256]."""
    table = np.full(256, 35, np.uint8)
    for material, strength in ROUGHNESS.items():
        table[material] = round(1000 * strength)
    return table


def _furrow(mask: NDArray[np.bool_], out: F32, *, origin: tuple[int, int], px_per_m: float, turn: float) -> None:
    """Plough a mask: sin(x cos t + y sin t) as two products of a row and a column."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    number = 2 * np.pi / _FURROW_M / px_per_m
    y = (np.arange(rows[0], rows[-1] + 1) + origin[0]) * (number * np.sin(turn))
    x = (np.arange(columns[0], columns[-1] + 1) + origin[1]) * (number * np.cos(turn))
    sin_y, cos_y = (part.astype(np.float32)[:, None] for part in (np.sin(y), np.cos(y)))
    sin_x, cos_x = (part.astype(np.float32) for part in (np.sin(x), np.cos(x)))
    waves = sin_y * cos_x + cos_y * sin_x
    np.multiply(out[window], 1 + np.float32(0.09) * waves, out=out[window], where=mask[window])


def raise_crowns(labels: NDArray[np.uint8], heights: F32, *, origin: tuple[int, int]) -> None:
    """Give woods the relief of their crowns, in place."""
    wood = labels == Material.WOOD
    if wood.any():
        relief = _window("canopy", size=len(labels), origin=origin)
        np.multiply(heights, np.float32(0.62) + np.float32(0.5) * relief, out=heights, where=wood)
