"""Trees as small pictures: crowns from above, whole trees from the side; made once, seeded."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic.noise import generator

NUM_VARIANTS = 6
TOP_SIZE = 64
SIDE_SIZE = 128
TRUNK_SHARE = 0.22  # of a broadleaf's height is bare trunk


# A picture of a tree, float32 [n, n, 3]: brightness (1 is the leaf's colour), opacity, share of wood.
Sprite = NDArray[np.float32]


def _clumps(random: np.random.Generator, *, centers: NDArray[np.float64], size: int, radius: float) -> Sprite:
    """Paint overlapping leafy balls, lit from above left, later ones in front."""
    light, alpha = np.zeros((size, size), np.float32), np.zeros((size, size), np.float32)
    y, x = np.mgrid[0:size, 0:size] / size * 2 - 1
    for (cx, cy), scale in zip(centers, random.uniform(0.75, 1.25, len(centers)), strict=True):
        dx, dy = (x - cx) / (radius * scale), (y - cy) / (radius * scale)
        inside = dx**2 + dy**2 + 0.25 * random.standard_normal((size, size)) < 1
        light[inside] = (0.95 - 0.3 * dy - 0.16 * dx)[inside]
        alpha[inside] = 1
    light *= (1 + 0.16 * random.standard_normal((size, size))).astype(np.float32)
    return np.stack([light, alpha, np.zeros_like(alpha)], axis=2)


@lru_cache(maxsize=1)
def tops() -> list[Sprite]:
    """Return crowns from above, broadleaf variants first, then conifers."""
    found: list[Sprite] = []
    for k in range(2 * NUM_VARIANTS):
        random = generator(0, "tree top", k)
        turn = random.uniform(0, 2 * np.pi, 26)
        out = np.sort(np.sqrt(random.random(26)))[::-1] * 0.66
        centers = np.stack([np.cos(turn) * out, np.sin(turn) * out], axis=1)
        sprite = _clumps(random, centers=centers, size=TOP_SIZE, radius=0.3)
        y, x = np.mgrid[0:TOP_SIZE, 0:TOP_SIZE] / TOP_SIZE * 2 - 1
        depth = 0.68 + 0.45 * np.sqrt(np.clip(1 - (x**2 + y**2), 0, 1))
        if k >= NUM_VARIANTS:
            depth = 0.6 + 0.7 * (1 - np.hypot(x, y)) + 0.12 * np.cos(9 * np.arctan2(y, x))
        sprite[..., 0] *= depth
        found.append(sprite)
    return found


@lru_cache(maxsize=1)
def sides() -> list[Sprite]:
    """Return whole trees from the side, broadleaf variants first, then conifers."""
    return [_broadleaf(k) for k in range(NUM_VARIANTS)] + [_conifer(k) for k in range(NUM_VARIANTS)]


def _broadleaf(k: int) -> Sprite:
    random = generator(0, "broadleaf", k)
    turn, out = random.uniform(0, 2 * np.pi, 46), np.sqrt(random.random(46)) * 0.78
    top, bottom = -0.98, 1 - 2 * TRUNK_SHARE
    middle, half = (top + bottom) / 2, (bottom - top) / 2
    centers = np.stack([np.cos(turn) * out, middle + np.sin(turn) * out * half], axis=1)
    centers = centers[np.argsort(-centers[:, 1])]
    sprite = _clumps(random, centers=centers, size=SIDE_SIZE, radius=0.2)
    y = np.linspace(-1, 1, SIDE_SIZE)[:, None]
    sprite[..., 0] *= 1.02 - 0.26 * (y - middle)
    return _with_trunk(sprite, up_to=middle)


def _conifer(k: int) -> Sprite:
    random = generator(0, "conifer", k)
    height = np.sort(random.uniform(-0.95, 0.8, 70))[::-1]
    reach = (height + 1.0) / 2 * 0.86
    centers = np.stack([random.uniform(-1, 1, 70) * reach, height], axis=1)
    sprite = _clumps(random, centers=centers, size=SIDE_SIZE, radius=0.13)
    return _with_trunk(sprite, up_to=0.5)


def _with_trunk(sprite: Sprite, *, up_to: float) -> Sprite:
    y, x = np.mgrid[0:SIDE_SIZE, 0:SIDE_SIZE] / SIDE_SIZE * 2 - 1
    trunk = (np.abs(x) < 0.05 + 0.02 * y) & (y > up_to) & (sprite[..., 1] < 0.5)
    bark = np.stack([0.8 - 2.5 * x, np.ones_like(x), np.ones_like(x)], axis=2)
    return np.where(trunk[..., None], bark, sprite).astype(np.float32)


def scaled(sprite: Sprite, *, width: int, height: int) -> Sprite:
    """Return a sprite at another size."""
    way = cv2.INTER_AREA if width < sprite.shape[1] else cv2.INTER_LINEAR
    resized: Sprite = cv2.resize(sprite, (width, height), interpolation=way)
    return resized


@lru_cache(maxsize=512)
def crown(variant: int, *, size: int) -> Sprite:
    """Return a crown from above at another size."""
    return scaled(tops()[variant], width=size, height=size)
