"""The view from the street: a 360-degree panorama cast onto the canvas, with trees as pictures standing in depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic.canvas import FIRST_BUILDING, FIRST_CAR, Canvas
from pipeline.synthetic.facade import building_table, wall_colours, wall_places
from pipeline.synthetic.geometry import PanoramaGeometry
from pipeline.synthetic.light import Day, leaf_colour
from pipeline.synthetic.noise import noise_tile
from pipeline.synthetic.rays import Hits, Rays, rays_of
from pipeline.synthetic.scene import Car, Material, Scene, Tree
from pipeline.synthetic.shading import lit_canvas, sunlight
from pipeline.synthetic.sky import haze_colour, paint_horizon, render_sky
from pipeline.synthetic.sprites import NUM_VARIANTS, scaled, sides

F32 = NDArray[np.float32]
_WALL_STEP_M = 0.45
_NEAREST_TREE_M = 2.2


@dataclass
class _Frame:
    """A panorama in the making: colours [H, W, 3] before exposure and the distance of what each pixel shows [H, W]."""

    image: F32
    depth: F32


def render_panorama(
    scene: Scene,
    canvas: Canvas,
    *,
    day: Day,
    cars: Sequence[Car],
    geometry: PanoramaGeometry,
    random: np.random.Generator,
) -> NDArray[np.uint8]:
    """Render the panorama, RGB uint8 [height_px, width_px, 3].

    Args:
        scene: The surroundings.
        canvas: Its raster with this day's cars; its half width is how far one sees.
        day: Light and season; its exposure is part of the canvas's colours too.
        cars: The cars painted on the canvas.
        geometry: Size of the image and height of the camera.
        random: Draws the clouds and the far horizon.
    """
    rays = rays_of(geometry, size=canvas.size, px_per_m=canvas.px_per_m)
    lit = sunlight(canvas, day, trees=scene.trees)
    ground = lit_canvas(canvas, day, buildings=scene.buildings, cars=cars, lit=lit)
    hits = rays.cast(canvas.heights)
    image = np.zeros((geometry.height_px, geometry.width_px, 3), np.float32)
    frame = _Frame(image, np.full(image.shape[:2], np.inf, np.float32))
    image[: rays.ground_rows] = render_sky(rays, day, random, rows=rays.ground_rows)
    wooded = float((canvas.labels[::8, ::8] == Material.WOOD).mean()) * 2 + random.uniform(0, 0.8)
    paint_horizon(image, rays, day, random, wooded=min(wooded, 1.4))
    _paint_ground(frame, rays, ground)
    _paint_solids(frame, rays, hits, scene=scene, canvas=canvas, ground=ground, day=day, cars=cars)
    _haze(frame, day)
    for tree in sorted(scene.trees, key=lambda tree: -_distance(tree, scene)):
        _stand(frame, tree, scene=scene, day=day, geometry=geometry)
    return np.clip(frame.image, 0, 255).astype(np.uint8)


def _paint_ground(frame: _Frame, rays: Rays, ground: NDArray[np.uint8]) -> None:
    for level, (first, last, columns, rows) in enumerate(rays.ground_maps):
        if last > first:
            frame.image[first:last] = cv2.remap(
                ground, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
            )
        if level < len(rays.ground_maps) - 1:
            ground = cv2.resize(ground, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    frame.depth[rays.ground_rows :] = rays.ground_distances[:, None]


def _paint_solids(
    frame: _Frame,
    rays: Rays,
    hits: Hits,
    *,
    scene: Scene,
    canvas: Canvas,
    ground: NDArray[np.uint8],
    day: Day,
    cars: Sequence[Car],
) -> None:
    """Paint everything that stands above the ground: its tops from the canvas, its sides by what they are."""
    row, column = np.nonzero(hits.sample >= 0)
    sample = hits.sample[row, column]
    top = hits.heights[sample, column]
    solid = top > 0.05
    row, column, sample, top = row[solid], column[solid], sample[solid], top[solid]
    place = rays.flat_index[sample, column]
    label = canvas.labels.ravel()[place].astype(np.int64)
    nearer = np.minimum(sample + 1, len(rays.radii) - 1)
    is_side = top - hits.heights[nearer, column] > _WALL_STEP_M
    distance = rays.radii[sample]
    slope, azimuth = rays.slopes[row], rays.azimuths[column]
    up = np.maximum(rays.geometry.camera_height_m + distance * slope, 0)
    colour = ground.reshape(-1, 3)[place].astype(np.float32)
    grain = noise_tile("leaves", roughness=0.35)[(up * 24).astype(int) % 512, (column * 2) % 512]
    gains = np.array(day.gains, np.float32)
    house = is_side & (label >= FIRST_BUILDING) & (label < FIRST_CAR)
    if house.any():
        table = building_table(scene.buildings, center=scene.center)
        index = (label[house] - FIRST_BUILDING) // 2
        camera_m = rays.geometry.camera_height_m
        walls = wall_places(table, index=index, azimuth=azimuth[house], slope=slope[house], camera_m=camera_m, day=day)
        px_angle = float(np.radians(rays.geometry.degrees_per_px))
        seen = wall_colours(table, walls, index=index, day=day, px_angle=px_angle, grain=grain[house])
        colour[house] = seen * gains
        distance[house] = walls.distance_m
    car = is_side & (label >= FIRST_CAR)
    colour[car] = _car_sides(cars, label=label[car], up=up[car], day=day) * gains
    green = (label == Material.WOOD) | (label == Material.HEDGE)
    colour[green] = _foliage(colour[green], up=up[green], top=top[green], grain=grain[green], is_side=is_side[green])
    frame.image[row, column] = colour
    frame.depth[row, column] = distance


def _car_sides(cars: Sequence[Car], *, label: NDArray[np.int64], up: F32, day: Day) -> F32:
    index = (label - FIRST_CAR) // 2
    body = np.array([car.rgb for car in cars], np.float32).reshape(-1, 3)[index]
    height = np.array([car.height_m for car in cars], np.float32)[index]
    is_glass = (up > 0.6 * height) & (up < 0.93 * height)
    body = np.where(is_glass[:, None], np.float32([46, 52, 60]), body)
    body = np.where((up < 0.33)[:, None], np.float32([26, 26, 28]), body)
    return (body * np.float32(day.ambient + 0.45 * day.sun)).astype(np.float32)


def _foliage(colour: F32, *, up: F32, top: F32, grain: F32, is_side: NDArray[np.bool_]) -> F32:
    depth = np.clip(up / np.maximum(top, 0.1), 0, 1)
    shade = np.where(is_side, 0.45 + 0.4 * depth, 0.9) * (1 + 0.24 * grain)
    return (colour * shade[:, None]).astype(np.float32)


def _haze(frame: _Frame, day: Day) -> None:
    share = 1 - np.exp(-frame.depth / np.float32(day.haze_m))
    share[np.isinf(frame.depth)] = 0
    frame.image += (haze_colour(day) - frame.image) * share[..., None]


def _distance(tree: Tree, scene: Scene) -> float:
    return float(np.hypot(tree.east_m - scene.center[0], tree.north_m - scene.center[1]))


def _stand(frame: _Frame, tree: Tree, *, scene: Scene, day: Day, geometry: PanoramaGeometry) -> None:
    """Stand a tree's picture at its place, where nothing nearer hides it."""
    distance = _distance(tree, scene)
    if distance < _NEAREST_TREE_M + tree.radius_m * 0.3:
        return
    east, north = tree.east_m - scene.center[0], tree.north_m - scene.center[1]
    column, bottom = (float(value) for value in geometry.pixel_of_point(east, north, 0.0))
    _, top = (float(value) for value in geometry.pixel_of_point(east, north, tree.height_m))
    half = np.degrees(np.arctan(tree.radius_m / distance)) / geometry.degrees_per_px
    width, height = max(2, round(2 * half)), max(2, round(bottom - top))
    left, first = round(column - half), round(top)
    variant = int(tree.shade * NUM_VARIANTS) + NUM_VARIANTS * tree.is_conifer
    colour = leaf_colour(day.season, shade=tree.shade, is_conifer=tree.is_conifer)
    view = np.cos(np.arctan2(east, north) - day.sun_azimuth_rad)  # 1: the sun is behind the tree
    light = day.ambient + day.sun * (0.62 - 0.3 * view)
    tint = np.stack([colour, np.float32([86, 70, 58])]) * np.array(day.gains, np.float32) * np.float32(light)
    tint += (haze_colour(day) - tint) * np.float32(1 - np.exp(-distance / day.haze_m))
    sprite = None
    for shift in (-geometry.width_px, 0, geometry.width_px):
        x0, x1 = max(left + shift, 0), min(left + shift + width, geometry.width_px)
        y0, y1 = max(first, 0), min(first + height, geometry.height_px)
        if x0 >= x1 or y0 >= y1:
            continue
        visible = frame.depth[y0:y1, x0:x1] > distance
        if not visible.any():
            continue
        sprite = sprite or scaled(sides()[variant], width=width, height=height)
        part = np.s_[y0 - first : y1 - first, x0 - left - shift : x1 - left - shift]
        alpha = (sprite.alpha[part] * visible)[..., None]
        leaf = sprite.light[part][..., None] * np.where(sprite.wood[part][..., None] > 0.5, tint[1], tint[0])
        window = frame.image[y0:y1, x0:x1]
        window += (leaf - window) * alpha
