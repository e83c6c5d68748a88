"""The panorama's sky and the far horizon behind everything within reach."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic.light import Day, leaf_colour
from pipeline.synthetic.noise import noise_tile
from pipeline.synthetic.rays import Rays

F32 = NDArray[np.float32]


def haze_colour(day: Day) -> F32:
    """Return the colour of the air at the horizon."""
    clear, closed = np.array([206, 220, 234], np.float32), np.array([196, 198, 202], np.float32)
    return clear + (closed - clear) * np.float32(_greyness(day))


def render_sky(rays: Rays, day: Day, random: np.random.Generator, *, rows: int) -> F32:
    """Return the upper rows of the panorama, float32 [rows, W, 3]; made at half the resolution."""
    width = rays.geometry.width_px
    elevation = np.arctan(rays.slopes[:rows:2])[:, None]
    turn = rays.azimuths[None, ::2] - np.float32(day.sun_azimuth_rad)
    grey = np.float32(_greyness(day))
    zenith = np.array([84, 128, 190], np.float32) * (1 - grey) + np.array([168, 172, 178], np.float32) * grey
    mix = np.clip(elevation / 0.57, 0, 1)[..., None] ** 0.6
    sky = haze_colour(day) * (1 - mix) + zenith * mix
    noise = _cloud_noise(elevation, random, columns=turn.shape[1])
    cover = np.clip((noise + np.float32(day.clouds * 2.6 - 1.9)) * 1.4, 0, 1)[..., None]
    cloud = (np.float32(244) - 74 * grey - np.clip(noise, -1, 1.5) * (8 + 16 * grey))[..., None]
    sky = sky + (cloud - sky) * cover * np.float32(0.92)
    near_sun = np.cos(turn) * np.cos(elevation - np.float32(day.sun_elevation_rad * 0.6))
    glow = np.exp((near_sun - 1) * 9)[..., None] * np.float32(0.75 * day.sun)
    full: F32 = cv2.resize((sky + (255 - sky) * glow).astype(np.float32), (width, rows))
    return full


def _greyness(day: Day) -> float:
    return float(np.clip(day.clouds * 1.3 - 0.4, 0, 1))


def _cloud_noise(elevation: F32, random: np.random.Generator, *, columns: int) -> F32:
    """Return a flat layer of clouds, foreshortened towards the horizon, [len(elevation), columns]."""
    tile = np.roll(noise_tile("clouds", roughness=1.5), tuple(random.integers(0, 512, 2)), axis=(0, 1))
    column = (np.arange(columns) / columns * 1024).astype(np.float32)[None, :].repeat(len(elevation), axis=0)
    row = (2600.0 / (np.degrees(elevation) + 9.0)).astype(np.float32).repeat(columns, axis=1)
    noise: F32 = cv2.remap(tile, column, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    return noise


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
