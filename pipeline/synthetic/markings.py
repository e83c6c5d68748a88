"""What is painted and parked on a street: centre lines, edges, crossings, and the places of cars."""

from __future__ import annotations

import numpy as np

from pipeline.synthetic.scene import CarSlot, Line, Material, Points, Street

_NODE_CLEAR_M = 9.0


def along(points: Points, distance_m: Points) -> tuple[Points, Points]:
    """Return places [n, 2] and unit tangents [n, 2] at distances along a curve."""
    steps = np.diff(points, axis=0)
    lengths = np.hypot(steps[:, 0], steps[:, 1])
    ends = np.concatenate([[0.0], np.cumsum(lengths)])
    segment = np.clip(np.searchsorted(ends, distance_m, side="right") - 1, 0, len(lengths) - 1)
    tangent = steps[segment] / lengths[segment, None]
    return points[segment] + tangent * (distance_m - ends[segment])[:, None], tangent


def length_m(points: Points) -> float:
    """Return the length of a curve."""
    return float(np.hypot(*np.diff(points, axis=0).T).sum())


def _beside(points: Points, *, start_m: float, end_m: float, aside_m: float) -> Points:
    """Return the part of a curve between two distances, moved to its left."""
    places, tangents = along(points, np.linspace(start_m, end_m, max(2, int((end_m - start_m) / 3))))
    return places + np.stack([-tangents[:, 1], tangents[:, 0]], axis=1) * aside_m


def street_markings(road: Street) -> tuple[Line, ...]:
    """Return the paint of a street: its centre line, white edges in the country, crossings before both junctions."""
    points, kind, has_edges = road.points, road.centre_paint, road.pavement_m == 0.0
    half = road.width_m / 2
    start, end = _NODE_CLEAR_M, length_m(points) - _NODE_CLEAR_M
    if kind == "none" or end - start < 6:
        return ()
    yellow = {"dashed": [], "double": [-0.18, 0.18], "avenue": [-0.2, 0.2]}[kind]
    white = {"dashed": [0.0], "double": [], "avenue": [-half / 2, half / 2]}[kind]
    solid = [(aside, Material.YELLOW_LINE) for aside in yellow]
    solid += [(aside, Material.WHITE_LINE) for aside in ((0.4 - half, half - 0.4) if has_edges else ())]
    found = [Line(_beside(points, start_m=start, end_m=end, aside_m=a), paint, 0.16) for a, paint in solid]
    for aside in white:
        for at in np.arange(start, end - 2.5, 6.5):
            dash = _beside(points, start_m=at, end_m=at + 2.6, aside_m=aside)
            found.append(Line(dash, Material.WHITE_LINE, 0.16))
    for at in (start - 2.2, end - 1.6) if road.has_crossings else ():
        for aside in np.arange(-half + 0.7, half - 0.3, 1.05):
            bar = _beside(points, start_m=at, end_m=at + 2.5, aside_m=float(aside))
            found.append(Line(bar, Material.WHITE_LINE, 0.5))
    return tuple(found)


def street_slots(points: Points, *, width_m: float) -> tuple[CarSlot, ...]:
    """Return where cars stand at the kerb or drive on a street."""
    slots: list[CarSlot] = []
    lanes = [(width_m / 2 - 1.15, 6.2, 0.3 if width_m > 8 else 0.12), (width_m / 4, 15.0, 0.13)]
    for offset, pitch, chance in lanes:
        places, tangents = along(points, np.arange(12.0, length_m(points) - 12.0, pitch))
        normals = np.stack([-tangents[:, 1], tangents[:, 0]], axis=1)
        angles = np.arctan2(tangents[:, 1], tangents[:, 0])
        for side in (-1.0, 1.0):
            for (east, north), angle in zip((places + side * offset * normals).tolist(), angles.tolist(), strict=True):
                slots.append(CarSlot(east, north, angle, chance))
    return tuple(slots)
