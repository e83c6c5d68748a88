"""Seeded randomness: a generator per named thing of the town, smooth fields over the plane, tiles of texture."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_OFFSET = 1 << 24  # seeds of numpy's generators are not negative, lattice coordinates are


def generator(seed: int, tag: str, *place: int) -> np.random.Generator:
    """Return the generator that belongs to one thing of the town, whoever asks and in whatever order."""
    return np.random.default_rng([seed, *tag.encode(), *(number + _OFFSET for number in place)])


@lru_cache(maxsize=64)
def _waves(seed: int, tag: str, wavelength_m: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    random = generator(seed, tag)
    direction = random.uniform(0, 2 * np.pi, 6)
    number = 2 * np.pi / (wavelength_m * random.uniform(0.7, 1.6, 6))
    return np.stack([np.cos(direction), np.sin(direction)]) * number, random.uniform(0, 2 * np.pi, 6)


def smooth_field(seed: int, tag: str, *, points: NDArray[np.float64], wavelength_m: float) -> NDArray[np.float64]:
    """Return a smooth random field at points [n, 2]: zero mean, unit variance, about that wavelength, [n]."""
    numbers, phases = _waves(seed, tag, wavelength_m)
    total: NDArray[np.float64] = np.sin(points @ numbers + phases).sum(axis=-1) / np.sqrt(3.0)
    return total


@lru_cache(maxsize=16)
def noise_tile(tag: str, *, size: int = 512, roughness: float = 1.0) -> NDArray[np.float32]:
    """Return tileable noise [size, size] of mean 0 and variance 1, amplitudes falling as 1 / frequency^roughness."""
    white = generator(0, tag).standard_normal((size, size))
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    frequency[0, 0] = np.inf
    tile = np.fft.irfft2(np.fft.rfft2(white) * np.maximum(frequency, 2 / size) ** -roughness, s=(size, size))
    scaled: NDArray[np.float32] = ((tile - tile.mean()) / tile.std()).astype(np.float32)
    return scaled
