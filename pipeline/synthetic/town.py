"""The town around a camera: blocks, streets and rivers within reach, and the cars of one day."""

from __future__ import annotations

import numpy as np

from pipeline.synthetic.blocks import block
from pipeline.synthetic.scene import CAR_COLOURS, Building, Car, CarSlot, Scene, Tree
from pipeline.synthetic.streets import SPACING_M, node, rivers, street

MAX_BUILDINGS = 99  # of a scene; as many as its raster has labels for


def nearby_cells(center: tuple[float, float], *, reach_m: float) -> list[tuple[int, int]]:
    """Return the lattice cells that may hold something within reach of a place."""
    spread = reach_m + SPACING_M  # jitter and warp move a junction by less than one spacing
    low = [int(np.floor((value - spread) / SPACING_M)) for value in center]
    high = [int(np.ceil((value + spread) / SPACING_M)) for value in center]
    return [(i, j) for i in range(low[0], high[0] + 1) for j in range(low[1], high[1] + 1)]


def scene_at(seed: int, center: tuple[float, float], *, reach_m: float = 80.0) -> Scene:
    """Return everything of the town within reach of a place."""
    scene = Scene(center=center, waters=rivers(seed, center, reach_m=reach_m))
    for i, j in nearby_cells(center, reach_m=reach_m):
        corners = np.array([node(seed, i + a, j + b) for a in (0, 1) for b in (0, 1)]) - center
        if (corners.min(axis=0) > reach_m + 8).any() or (corners.max(axis=0) < -reach_m - 8).any():
            continue
        made = block(seed, i, j)
        scene.patches += made.patches
        scene.lines += made.lines
        scene.buildings += [house for house in made.buildings if _is_near(house, center, reach_m=reach_m + 15)]
        scene.trees += [tree for tree in made.trees if _is_near(tree, center, reach_m=reach_m)]
        scene.slots += [slot for slot in made.slots if _is_near(slot, center, reach_m=reach_m)]
    _add_streets(seed, scene, reach_m=reach_m)
    scene.buildings.sort(key=lambda house: np.hypot(house.east_m - center[0], house.north_m - center[1]))
    del scene.buildings[MAX_BUILDINGS:]
    return scene


def _is_near(thing: Building | Tree | CarSlot, center: tuple[float, float], *, reach_m: float) -> bool:
    return abs(thing.east_m - center[0]) < reach_m and abs(thing.north_m - center[1]) < reach_m


def _add_streets(seed: int, scene: Scene, *, reach_m: float) -> None:
    for i, j in nearby_cells(scene.center, reach_m=reach_m):
        for axis in ("east", "north", "diagonal"):
            road = street(seed, i, j, axis=axis)
            if road is None:
                continue
            offset = road.points - scene.center
            if (offset.min(axis=0) < reach_m + 8).all() and (offset.max(axis=0) > -reach_m - 8).all():
                scene.streets.append(road)
                scene.slots += [slot for slot in road.slots if _is_near(slot, scene.center, reach_m=reach_m)]


def cars_of_a_day(scene: Scene, random: np.random.Generator, *, clear_m: float) -> list[Car]:
    """Return the cars that stand in the scene's slots on one day, none within `clear_m` of the camera."""
    business = random.uniform(0.4, 1.3)
    cars: list[Car] = []
    for slot in scene.slots:
        draw, colour, size, turn = random.random(4)
        if draw > slot.chance * business or _is_near(slot, scene.center, reach_m=clear_m):
            continue
        length, height = (4.4, 1.5) if size < 0.8 else (5.6, 2.1) if size < 0.97 else (7.5, 3.0)
        angle = slot.angle + (np.pi if turn < 0.5 else 0.0)
        number = int(colour * len(CAR_COLOURS))
        cars.append(Car(slot.east_m, slot.north_m, angle, number, length, 1.85 if length < 7 else 2.3, height))
    return cars
