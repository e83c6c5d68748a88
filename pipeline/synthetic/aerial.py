"""The view from above: the canvas in one day's light with the crowns of its trees."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic.canvas import Canvas
from pipeline.synthetic.geometry import AerialGeometry
from pipeline.synthetic.light import Day, leaf_colour
from pipeline.synthetic.scene import Car, Scene, Tree
from pipeline.synthetic.shading import crop, lit_canvas, sunlight
from pipeline.synthetic.sprites import NUM_VARIANTS, scaled, tops


def render_aerial(
    scene: Scene, canvas: Canvas, *, day: Day, cars: Sequence[Car], geometry: AerialGeometry
) -> NDArray[np.uint8]:
    """Render the aerial image, RGB uint8 [size_px, size_px, 3].

    Args:
        scene: The surroundings.
        canvas: Its raster with this day's cars, at the image's resolution and at least as large.
        day: Light and season.
        cars: The cars painted on the canvas.
        geometry: Size and extent.
    """
    lit = sunlight(canvas, day, trees=scene.trees)
    middle = crop(canvas, size_px=geometry.size_px)
    edge = (canvas.size - geometry.size_px) // 2
    lit = lit[edge : edge + geometry.size_px, edge : edge + geometry.size_px]
    image = lit_canvas(middle, day, buildings=scene.buildings, cars=cars, lit=lit)
    for tree in sorted(scene.trees, key=lambda tree: tree.height_m):
        _stamp(image, tree, scene=scene, day=day, geometry=geometry)
    return cv2.GaussianBlur(image, (3, 3), 0.7)


def _stamp(image: NDArray[np.uint8], tree: Tree, *, scene: Scene, day: Day, geometry: AerialGeometry) -> None:
    column, row = geometry.pixel_of(tree.east_m - scene.center[0], tree.north_m - scene.center[1])
    size = max(3, round(2 * tree.radius_m * geometry.px_per_m))
    left, top = round(float(column) - size / 2), round(float(row) - size / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + size, geometry.size_px), min(top + size, geometry.size_px)
    if x0 >= x1 or y0 >= y1:
        return
    variant = int(tree.shade * NUM_VARIANTS) + NUM_VARIANTS * tree.is_conifer
    sprite = scaled(tops()[variant], width=size, height=size)
    part = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
    colour = leaf_colour(day.season, shade=tree.shade, is_conifer=tree.is_conifer) * np.array(day.gains, np.float32)
    brightness = sprite.light[part] * np.float32(day.ambient + 0.85 * day.sun)
    alpha = sprite.alpha[part]
    window = image[y0:y1, x0:x1]
    for c in range(3):
        leaf = np.minimum(brightness * colour[c], np.float32(255))
        window[..., c] = window[..., c] + (leaf - window[..., c]) * alpha
