"""The view from the street: a 360-degree panorama cast onto the canvas, with trees as pictures standing in depth."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic.canvas import CAR_GLASS, FIRST_BUILDING, FIRST_CABIN, FIRST_CAR, Canvas
from pipeline.synthetic.facade import building_table, wall_colours, walls_along
from pipeline.synthetic.geometry import PanoramaGeometry
from pipeline.synthetic.light import Day, leaf_colour
from pipeline.synthetic.noise import noise_tile
from pipeline.synthetic.rays import Hits, Rays, rays_of
from pipeline.synthetic.scene import CAR_COLOURS, Material, Scene, Tree
from pipeline.synthetic.shading import light_on, lit_canvas
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
    geometry: PanoramaGeometry,
    random: np.random.Generator,
) -> NDArray[np.uint8]:
    """Render the panorama, RGB uint8 [height_px, width_px, 3].

    Args:
        scene: The surroundings.
        canvas: Its raster with this day's cars; its half width is how far one sees.
        day: Light and season; its exposure is part of the canvas's colours too.
        geometry: Size of the image and height of the camera.
        random: Draws the clouds and the far horizon.
    """
    rays = rays_of(geometry, size=canvas.size, px_per_m=canvas.px_per_m)
    light = light_on(canvas, day, trees=scene.trees)
    ground = lit_canvas(canvas, day, buildings=scene.buildings, light=light)
    hits = rays.cast(canvas.heights)
    image = np.zeros((geometry.height_px, geometry.width_px, 3), np.float32)
    frame = _Frame(image, np.full(image.shape[:2], np.inf, np.float32))
    image[: rays.ground_rows] = render_sky(rays, day, random, rows=rays.ground_rows)
    wooded = float((canvas.labels[::8, ::8] == Material.WOOD).mean()) * 2 + random.uniform(0, 0.8)
    paint_horizon(image, rays, day, random, wooded=min(wooded, 1.4))
    _paint_ground(frame, rays, ground, day=day)
    _paint_solids(frame, rays, hits, scene=scene, canvas=canvas, ground=ground, day=day)
    _stand_trees(frame, scene, day=day, geometry=geometry)
    soft: NDArray[np.uint8] = cv2.GaussianBlur(cv2.convertScaleAbs(frame.image), (3, 3), 0.55)
    return soft


def _paint_ground(frame: _Frame, rays: Rays, ground: NDArray[np.uint8], *, day: Day) -> None:
    for level, (first, last, columns, rows) in enumerate(rays.ground_maps):
        if last > first:
            frame.image[first:last] = cv2.remap(
                ground, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
            )
        if level < len(rays.ground_maps) - 1:
            ground = cv2.resize(ground, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    _hazed(frame.image[rays.ground_rows :], rays.ground_distances[:, None, None], day=day)
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
) -> None:
    """Paint everything that stands above the ground: its tops from the canvas, its sides by what they are."""
    flat = hits.sample * np.int32(rays.geometry.width_px) + np.arange(rays.geometry.width_px, dtype=np.int32)
    tops = hits.heights.ravel()[flat]
    row, column = np.nonzero((tops > 0.05) & (hits.sample >= 0))
    sample, top = hits.sample[row, column], tops[row, column]
    place = rays.flat_index[sample, column]
    label = canvas.labels.ravel()[place].astype(np.int64)
    nearer = np.minimum(sample + 1, len(rays.radii) - 1)
    is_side = top - hits.heights[nearer, column] > _WALL_STEP_M
    distance = rays.radii[sample]
    up = np.maximum(rays.geometry.camera_height_m + distance * rays.slopes[row], 0)
    colour = ground.reshape(-1, 3)[place].astype(np.float32)
    grain = noise_tile("leaves", roughness=0.35)[(up * np.float32(24)).astype(np.int32) % 512, (column * 2) % 512]
    house = np.flatnonzero(is_side & (label >= FIRST_BUILDING))
    if len(house):
        colour[house], distance[house], up[house] = _walls(
            scene, rays, day=day, label=label[house], row=row[house], column=column[house]
        )
        colour[house] *= 1 + np.float32(0.025) * grain[house, None]
    car = is_side & (label >= FIRST_CAR) & (label <= CAR_GLASS)
    colour[car] = _car_sides(label[car], up=up[car], top=top[car], day=day)
    green = (label == Material.WOOD) | (label == Material.HEDGE)
    colour[green] = _foliage(colour[green], up=up[green], top=top[green], grain=grain[green], is_side=is_side[green])
    seen = up >= 0  # a ray that would meet the wall under the ground has met the ground before
    frame.image[row[seen], column[seen]] = _hazed(colour[seen], distance[seen, None], day=day)
    frame.depth[row[seen], column[seen]] = distance[seen]


def _walls(
    scene: Scene,
    rays: Rays,
    *,
    day: Day,
    label: NDArray[np.int64],
    row: NDArray[np.int64],
    column: NDArray[np.int64],
) -> tuple[F32, F32, F32]:
    """Return colours [P, 3], exact distances [P] and heights above the ground [P] of pixels that see walls."""
    number = (label - FIRST_BUILDING) // 2
    in_view = np.flatnonzero(np.bincount(number))
    index = np.searchsorted(in_view, number)
    table = building_table([scene.buildings[k] for k in in_view], center=scene.center)
    px_angle = float(np.radians(rays.geometry.degrees_per_px))
    walls = walls_along(table, azimuths=rays.azimuths, px_angle=px_angle, day=day)
    distance = walls.distance_m.take(index * len(rays.azimuths) + column)
    up = np.float32(rays.geometry.camera_height_m) + distance * rays.slopes[row]
    colour = wall_colours(table, walls, index=index, column=column, up=up, day=day)
    return colour * np.array(day.gains, np.float32), distance, up


def _car_sides(label: NDArray[np.int64], *, up: F32, top: F32, day: Day) -> F32:
    """Return the colours of the sides of cars: dark below, windows around the cabin, [P, 3]."""
    colours = np.array([*CAR_COLOURS, *CAR_COLOURS, (46, 52, 60)], np.float32)
    colour: F32 = colours[label - FIRST_CAR]
    colour[(label >= FIRST_CABIN) & (up > 0.64 * top) & (up < 0.93 * top)] = colours[-1]
    colour[up < 0.28] = 26
    return colour * np.array(day.gains, np.float32) * np.float32(day.ambient + 0.45 * day.sun)


def _foliage(colour: F32, *, up: F32, top: F32, grain: F32, is_side: NDArray[np.bool_]) -> F32:
    depth = np.clip(up / np.maximum(top, 0.1), 0, 1)
    shade = np.where(is_side, 0.45 + 0.4 * depth, 0.9) * (1 + 0.24 * grain)
    shaded: F32 = (colour * shade[:, None]).astype(np.float32)
    return shaded


def _hazed(colour: F32, distance: F32, *, day: Day) -> F32:
    """Return colours [..., 3] seen through the air at distances that broadcast against [..., 1]."""
    share = 1 - np.exp(distance * np.float32(-1 / day.haze_m))
    colour += (haze_colour(day) - colour) * share
    return colour


def _stand_trees(frame: _Frame, scene: Scene, *, day: Day, geometry: PanoramaGeometry) -> None:
    """Stand the pictures of all trees at their places, far ones first."""
    if not scene.trees:
        return
    numbers = np.array([(tree.east_m, tree.north_m, tree.radius_m, tree.height_m) for tree in scene.trees])
    east, north, radius, height = (numbers - (*scene.center, 0.0, 0.0)).T
    distance = np.hypot(east, north)
    column, bottom = geometry.pixel_of_point(east, north, 0.0)
    _, top = geometry.pixel_of_point(east, north, height)
    half = np.degrees(np.arctan(radius / distance)) / geometry.degrees_per_px
    boxes = np.round(np.stack([column - half, top, np.maximum(2 * half, 2), np.maximum(bottom - top, 2)], axis=1))
    view = np.cos(np.arctan2(east, north) - day.sun_azimuth_rad)  # 1: the sun is behind the tree
    light = day.ambient + day.sun * (0.62 - 0.3 * view)
    for k in np.argsort(-distance, kind="stable"):
        if distance[k] > _NEAREST_TREE_M + radius[k] * 0.3:
            tint = _tree_tint(scene.trees[k], light=float(light[k]), distance=float(distance[k]), day=day)
            _stand(frame, scene.trees[k], box=boxes[k].astype(int).tolist(), distance=float(distance[k]), tint=tint)


def _tree_tint(tree: Tree, *, light: float, distance: float, day: Day) -> F32:
    """Return the colours of a tree's leaves and wood in the day's light and air, [2, 3]."""
    leaf = leaf_colour(day.season, shade=tree.shade, is_conifer=tree.is_conifer)
    tint = np.array([leaf, (86, 70, 58)], np.float32) * np.array(day.gains, np.float32) * np.float32(light)
    return _hazed(tint, np.array([[distance]], np.float32), day=day)


def _stand(frame: _Frame, tree: Tree, *, box: list[int], distance: float, tint: F32) -> None:
    """Stand a tree's picture in its box (left, top, width, height) where nothing nearer hides it."""
    left, first, width, height = box
    num_rows, num_columns = frame.depth.shape
    variant = int(tree.shade * NUM_VARIANTS) + NUM_VARIANTS * tree.is_conifer
    sprite = None
    for shift in (-num_columns, 0, num_columns):  # a tree in the south stands at both edges
        x0, x1 = max(left + shift, 0), min(left + shift + width, num_columns)
        y0, y1 = max(first, 0), min(first + height, num_rows)
        if x0 >= x1 or y0 >= y1:
            continue
        visible = frame.depth[y0:y1, x0:x1] > distance
        if not visible.any():
            continue
        sprite = scaled(sides()[variant], width=width, height=height) if sprite is None else sprite
        part = sprite[y0 - first : y1 - first, x0 - left - shift : x1 - left - shift]
        leaf = part[..., :1] * np.where(part[..., 2:] > 0.5, tint[1], tint[0])
        window = frame.image[y0:y1, x0:x1]
        window += (leaf - window) * (part[..., 1] * visible)[..., None]
