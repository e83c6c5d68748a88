"""The irregular street network: a warped, jittered lattice of junctions with curved, missing and diagonal streets.

Every piece follows from (seed, lattice place) alone, so a camera's surroundings are made without making the town.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from pipeline.synthetic.markings import street_markings, street_slots
from pipeline.synthetic.noise import generator, smooth_field
from pipeline.synthetic.scene import Line, Material, Points, Street

SPACING_M = 84.0
_JITTER_M = 17.0
_WARP_M = 26.0
_RIVER_PERIOD_M = 620.0
_STEPS = {"east": (1, 0), "north": (0, 1), "diagonal": (1, 1)}
_SECTIONS = (  # cumulated share, width_m, centre line
    (0.16, 13.0, "avenue"),
    (0.46, 8.8, "double"),
    (0.80, 7.4, "dashed"),
    (1.00, 5.6, "none"),
)


@lru_cache(maxsize=16384)
def node(seed: int, i: int, j: int) -> tuple[float, float]:
    """Return the junction (i, j) of the lattice."""
    jitter = generator(seed, "node", i, j).uniform(-_JITTER_M, _JITTER_M, 2)
    place = np.array([[i, j]], dtype=np.float64) * SPACING_M
    east = smooth_field(seed, "warp east", points=place, wavelength_m=420.0)[0] * _WARP_M
    north = smooth_field(seed, "warp north", points=place, wavelength_m=420.0)[0] * _WARP_M
    return float(place[0, 0] + jitter[0] + east), float(place[0, 1] + jitter[1] + north)


@lru_cache(maxsize=16384)
def centre_line(seed: int, i: int, j: int, *, axis: str) -> Points:
    """Return the curve [17, 2] from junction (i, j) along an axis: a Catmull-Rom spline through its line's nodes."""
    step_i, step_j = _STEPS[axis]
    before, start, end, after = (np.array(node(seed, i + k * step_i, j + k * step_j)) for k in (-1, 0, 1, 2))
    if axis == "diagonal":
        before, after = start, end
    t = np.linspace(0, 1, 17)[:, None]
    curve: Points = 0.5 * (
        2 * start
        + (end - before) * t
        + (2 * before - 5 * start + 4 * end - after) * t**2
        + (3 * start - before - 3 * end + after) * t**3
    )
    return curve


@lru_cache(maxsize=16384)
def street(seed: int, i: int, j: int, *, axis: str) -> Street | None:
    """Return the street along a lattice edge with its paint and its cars' places, or none."""
    road = bare_street(seed, i, j, axis=axis)
    if road is None:
        return None
    slots = street_slots(road.points, width_m=road.width_m)
    return road._replace(markings=street_markings(road), slots=slots)


@lru_cache(maxsize=16384)
def bare_street(seed: int, i: int, j: int, *, axis: str) -> Street | None:
    """Return the street along a lattice edge without its paint, or none where the network leaves it out."""
    random = generator(seed, f"street {axis}", i, j)
    present, own, crossing, surface = random.random(4)
    if present > (0.13 if axis == "diagonal" else 0.9):
        return None
    points = centre_line(seed, i, j, axis=axis)
    if axis != "north" and np.abs(river_distance(seed, points)).min() < 24.0:
        return None  # a street along the water would lie in it; those across are bridges
    line = j if axis == "east" else i
    drawn = generator(seed, f"section {axis}", line).random() if own > 0.2 and axis != "diagonal" else own * 5 % 1.0
    width, kind = next((width, kind) for most, width, kind in _SECTIONS if drawn < most)
    urban = urbanity(seed, points[8:9])
    pavement = 0.0 if urban < -0.45 else 2.4 if urban > 0.7 else 1.7
    material = Material.ASPHALT if surface < 0.6 else Material.ASPHALT_OLD
    if kind == "none" and urban < -0.2 and surface < 0.5:
        width, pavement, material = 4.6, 0.0, Material.GRAVEL
    has_crossings = bool(urban > -0.1 and crossing < 0.6)
    return Street(points, width, pavement, material, kind, has_crossings)


def urbanity(seed: int, points: Points) -> float:
    """Return how dense the town is at a place [1, 2]: about -2 (farmland) to 2 (centre)."""
    return float(smooth_field(seed, "urban", points=points, wavelength_m=700.0)[0] + 0.25)


def river_line(seed: int, *, east_from: float, east_to: float, band: int) -> Points:
    """Return the centre line of one of the town's rivers between two eastings, [n, 2]."""
    east = np.arange(np.floor(east_from / 6) * 6, east_to + 6, 6.0)
    return np.stack([east, river_north(seed, east) + band * _RIVER_PERIOD_M], axis=1)


def river_north(seed: int, east: Points) -> Points:
    """Return the northing of band 0's river at eastings [n]."""
    points = np.stack([east, np.zeros_like(east)], axis=1)
    bend = 38.0 * smooth_field(seed, "river", points=points, wavelength_m=340.0)
    return bend + generator(seed, "river place").uniform(0.0, _RIVER_PERIOD_M)


def river_distance(seed: int, points: Points) -> Points:
    """Return about how far points [n, 2] lie north of the nearest river (negative: south), [n]."""
    offset = points[:, 1] - river_north(seed, points[:, 0])
    return (offset + _RIVER_PERIOD_M / 2) % _RIVER_PERIOD_M - _RIVER_PERIOD_M / 2


def river_width(seed: int) -> float:
    """Return the width of the town's rivers."""
    return float(generator(seed, "river width").uniform(10.0, 17.0))


def rivers(seed: int, center: tuple[float, float], *, reach_m: float) -> list[Line]:
    """Return banks and water of the rivers within reach of a place."""
    line = river_line(seed, east_from=center[0] - reach_m - 20, east_to=center[0] + reach_m + 20, band=0)
    width = river_width(seed)
    bands = np.round((center[1] - line[:, 1]) / _RIVER_PERIOD_M)
    found: list[Line] = []
    for band in np.unique(bands):
        points = line + np.array([0.0, band * _RIVER_PERIOD_M])
        if np.abs(points[:, 1] - center[1]).min() < reach_m + 20:
            found += [Line(points, Material.SAND, width + 4.0), Line(points, Material.WATER, width)]
    return found
