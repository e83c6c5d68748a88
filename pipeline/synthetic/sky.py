"""The panorama's sky and the far horizon behind everything within reach."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic.light import Day, leaf_colour
from pipeline.synthetic.noise import noise_tile
from pipeline.synthetic.rays import Rays

F32 = NDArray[np.float32]


@lru_cache(maxsize=2)
def _cloud_maps(rays: Rays, *, rows: int) -> tuple[F32, F32]:
    """Return where each sky pixel looks in the cloud tile: a flat layer, foreshortened towards the horizon."""
    elevation = np.degrees(np.arctan(rays.slopes[:rows]))
    column = (np.arange(rays.geometry.width_px) / rays.geometry.width_px * 1024).astype(np.float32)
    row = (2600.0 / (elevation + 9.0)).astype(np.float32)
    return np.broadcast_to(column, (rows, len(column))).copy(), np.repeat(row[:, None], len(column), axis=1)


def haze_colour(day: Day) -> F32:
    """Return the colour of the air at the horizon."""
    grey = np.clip(day.clouds * 1.3 - 0.4, 0, 1)
    return (np.float32([206, 220, 234]) * (1 - grey) + np.float32([196, 198, 202]) * grey).astype(np.float32)


def render_sky(rays: Rays, day: Day, random: np.random.Generator, *, rows: int) -> F32:
    """Return the upper rows of the panorama, float32 [rows, W, 3]."""
    elevation = np.arctan(rays.slopes[:rows])[:, None]
    turn = rays.azimuths[None, :] - np.float32(day.sun_azimuth_rad)
    grey = np.float32(np.clip(day.clouds * 1.3 - 0.4, 0, 1))
    zenith = np.float32([84, 128, 190]) * (1 - grey) + np.float32([168, 172, 178]) * grey
    mix = np.clip(elevation / 0.57, 0, 1)[..., None] ** 0.6
    sky = np.broadcast_to(haze_colour(day) * (1 - mix) + zenith * mix, (rows, rays.geometry.width_px, 3))
    tile = np.roll(noise_tile("clouds", roughness=1.5), tuple(random.integers(0, 512, 2)), axis=(0, 1))
    columns, lines = _cloud_maps(rays, rows=rows)
    noise = cv2.remap(tile, columns, lines, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    cover = np.clip((noise + np.float32(day.clouds * 2.6 - 1.9)) * 1.4, 0, 1)[..., None]
    cloud = (np.float32(244) - 74 * grey - np.clip(noise, -1, 1.5) * (8 + 16 * grey))[..., None]
    sky = sky + (cloud - sky) * cover * 0.92
    near_sun = np.cos(turn) * np.cos(elevation - day.sun_elevation_rad * 0.6)
    glow = np.exp((near_sun - 1) * 9)[..., None] * np.float32(0.75 * day.sun)
    return (sky + (255 - sky) * glow).astype(np.float32)


def paint_horizon(image: F32, rays: Rays, day: Day, random: np.random.Generator, *, wooded: float) -> None:
    """Paint the far line of trees over the sky, down to the ground within reach."""
    width = rays.geometry.width_px
    shape = np.interp(np.arange(width) / width * 512, np.arange(513), _wrapped(random))
    profile_deg = np.clip(0.5 + 1.6 * wooded + 0.7 * (0.4 + wooded) * shape, 0.2, 5.0).astype(np.float32)
    leaf = leaf_colour(day.season, shade=0.35, is_conifer=False) * np.float32(day.ambient + 0.5 * day.sun)
    far = leaf + (haze_colour(day) - leaf) * np.float32(1 - np.exp(-150 / day.haze_m))
    rows = slice(max(0, rays.geometry.height_px // 2 - 24), rays.ground_rows)
    elevation = np.degrees(np.arctan(rays.slopes[rows]))[:, None]
    cover = np.clip((profile_deg[None, :] - elevation) / np.float32(rays.geometry.degrees_per_px), 0, 1)[..., None]
    speckle = noise_tile("twigs", roughness=0.4)[: cover.shape[0], np.arange(width) % 512][..., None]
    image[rows] += (far * (1 + 0.1 * speckle) - image[rows]) * cover


def _wrapped(random: np.random.Generator) -> F32:
    line = noise_tile("horizon", roughness=0.9)[random.integers(512)]
    return np.append(line, line[0])
