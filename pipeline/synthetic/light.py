"""One day's light and season, and the colours that the town's materials have in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic.scene import Material

Colour = NDArray[np.float32]  # [3], RGB in 0..255

_BASE: dict[Material, tuple[int, int, int]] = {
    Material.FIELD_GREEN: (92, 112, 68),
    Material.FIELD_GOLD: (178, 158, 108),
    Material.FIELD_SOIL: (124, 96, 76),
    Material.FIELD_MOWN: (150, 156, 96),
    Material.WATER: (58, 80, 92),
    Material.SAND: (186, 170, 138),
    Material.GRAVEL: (168, 160, 148),
    Material.ASPHALT: (98, 98, 102),
    Material.ASPHALT_OLD: (138, 136, 134),
    Material.PAVEMENT: (176, 172, 164),
    Material.PLAZA: (162, 154, 144),
    Material.WHITE_LINE: (236, 236, 232),
    Material.YELLOW_LINE: (228, 176, 56),
    Material.POOL: (70, 172, 200),
    Material.COURT_RED: (164, 86, 70),
    Material.COURT_GREEN: (70, 122, 92),
    Material.ROOF_UNIT: (206, 206, 204),
    Material.KERB: (150, 146, 140),
    Material.SOIL: (116, 92, 74),
}
_SEASONS: dict[str, dict[str, tuple[int, int, int]]] = {
    "spring": {"lawn": (100, 124, 70), "meadow": (122, 130, 82), "leaf": (96, 122, 60), "leaf_other": (130, 138, 82)},
    "summer": {"lawn": (88, 108, 62), "meadow": (126, 124, 82), "leaf": (62, 88, 48), "leaf_other": (82, 100, 54)},
    "autumn": {"lawn": (112, 114, 70), "meadow": (142, 126, 88), "leaf": (134, 96, 52), "leaf_other": (150, 72, 46)},
    "drought": {"lawn": (150, 138, 92), "meadow": (172, 150, 104), "leaf": (90, 102, 58), "leaf_other": (116, 112, 66)},
}
# How strongly the texture of the ground shows on a material.
ROUGHNESS = {
    Material.MEADOW: 0.13, Material.LAWN: 0.075, Material.FIELD_GREEN: 0.1, Material.FIELD_GOLD: 0.1,
    Material.FIELD_SOIL: 0.09, Material.FIELD_MOWN: 0.08, Material.WOOD: 0.1, Material.HEDGE: 0.16,
    Material.WATER: 0.035, Material.GRAVEL: 0.07, Material.SAND: 0.05, Material.ASPHALT: 0.04,
    Material.ASPHALT_OLD: 0.06, Material.SOIL: 0.12,
}  # fmt: skip
FIELDS = (Material.FIELD_GREEN, Material.FIELD_GOLD, Material.FIELD_SOIL, Material.FIELD_MOWN)


@dataclass(frozen=True, kw_only=True)
class Day:
    """The light and the season of one view.

    Attributes:
        sun_azimuth_rad: Where the sun stands, clockwise from north.
        sun_elevation_rad: Its height above the horizon.
        sun: Brightness of direct light on a surface that faces it, in units of albedo.
        ambient: Brightness of skylight.
        gains: Colour temperature and exposure, factors of red, green and blue.
        season: Key of the season's colours.
        clouds: 0 (clear sky) to 1 (closed).
        haze_m: Distance over which the air takes 63 % of the contrast.
    """

    sun_azimuth_rad: float = 2.6
    sun_elevation_rad: float = 0.8
    sun: float = 0.65
    ambient: float = 0.5
    gains: tuple[float, float, float] = (1.0, 1.0, 1.0)
    season: str = "summer"
    clouds: float = 0.3
    haze_m: float = 500.0

    @property
    def sun_direction(self) -> tuple[float, float, float]:
        """Unit vector towards the sun: east, north, up."""
        flat = np.cos(self.sun_elevation_rad)
        east, north = flat * np.sin(self.sun_azimuth_rad), flat * np.cos(self.sun_azimuth_rad)
        return float(east), float(north), float(np.sin(self.sun_elevation_rad))


def draw_day(random: np.random.Generator, *, is_clear: bool) -> Day:
    """Draw a day; aerial images are flown on clear ones, panoramas are taken on any."""
    clouds = random.uniform(0.0, 0.3) if is_clear else random.choice([random.uniform(0, 0.6), random.uniform(0.6, 1.0)])
    sun = 0.72 * (1.0 - max(0.0, clouds - 0.35) * 1.35)
    warmth, exposure = random.normal(0, 0.045), np.exp(random.normal(0, 0.1))
    return Day(
        sun_azimuth_rad=random.uniform(0.5 * np.pi, 1.5 * np.pi),
        sun_elevation_rad=np.radians(random.uniform(28.0, 62.0)),
        sun=sun,
        ambient=0.47 + 0.36 * (0.72 - sun),
        gains=(exposure * (1 + warmth), exposure, exposure * (1 - warmth)),
        season=("spring", "summer", "summer", "autumn", "drought")[random.integers(5)],
        clouds=clouds,
        haze_m=float(np.exp(random.uniform(np.log(250.0), np.log(1200.0)))),
    )


def material_colours(season: str) -> NDArray[np.float32]:
    """Return the albedo of every material in a season, [num_materials, 3] RGB in 0..255."""
    own = _SEASONS[season]
    leaf = np.array(own["leaf"]) * 0.6 + np.array(own["leaf_other"]) * 0.4
    table = {**_BASE, Material.LAWN: own["lawn"], Material.MEADOW: own["meadow"]}
    table |= {Material.WOOD: tuple(leaf * 0.95), Material.HEDGE: tuple(np.array(own["leaf"]) * 0.9)}
    if season == "drought":
        table[Material.FIELD_GREEN] = (140, 136, 84)
    return np.array([table[material] for material in Material], np.float32)


def leaf_colour(season: str, *, shade: float, is_conifer: bool) -> Colour:
    """Return a tree's colour; `shade` is the tree's own number, so neighbours differ the same way all year."""
    if is_conifer:
        needles: Colour = np.array((52, 78, 54), np.float32) * np.float32(0.85 + 0.4 * shade)
        return needles
    own = _SEASONS[season]
    mix = (shade * 7.3) % 1.0
    leaf = np.array(own["leaf"], np.float32) * (1 - mix) + np.array(own["leaf_other"], np.float32) * mix
    brightness: Colour = (leaf * (0.8 + 0.45 * shade)).astype(np.float32)
    return brightness
