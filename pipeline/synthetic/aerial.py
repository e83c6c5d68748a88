"""The view from above: the canvas in one day's light with the crowns of its trees."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic.canvas import Canvas
from pipeline.synthetic.geometry import AerialGeometry
from pipeline.synthetic.light import Day, leaf_colour
from pipeline.synthetic.scene import Scene, Tree
from pipeline.synthetic.shading import light_on, lit_canvas
from pipeline.synthetic.sprites import NUM_VARIANTS, crown


def render_aerial(scene: Scene, canvas: Canvas, *, day: Day, geometry: AerialGeometry) -> NDArray[np.uint8]:
    """Render the aerial image, RGB uint8 [size_px, size_px, 3].

    Args:
        scene: The surroundings.
        canvas: Its raster with this day's cars, at the image's resolution and at least as large.
        day: Light and season.
        geometry: Size and extent.
    """
    edge = (canvas.size - geometry.size_px) // 2
    window = np.s_[edge : edge + geometry.size_px, edge : edge + geometry.size_px]
    light = light_on(canvas, day, trees=scene.trees)[window]
    parts = canvas.labels[window], canvas.heights[window], canvas.texture[window]
    image = lit_canvas(Canvas(canvas.center, *parts, canvas.px_per_m), day, buildings=scene.buildings, light=light)
    for tree in sorted(scene.trees, key=lambda tree: tree.height_m):
        _stamp(image, tree, scene=scene, day=day, geometry=geometry)
    soft: NDArray[np.uint8] = cv2.GaussianBlur(image, (3, 3), 0.7)
    return soft


def _stamp(image: NDArray[np.uint8], tree: Tree, *, scene: Scene, day: Day, geometry: AerialGeometry) -> None:
    column, row = geometry.pixel_of(tree.east_m - scene.center[0], tree.north_m - scene.center[1])
    size = max(3, round(2 * tree.radius_m * geometry.px_per_m))
    left, top = round(float(column) - size / 2), round(float(row) - size / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + size, geometry.size_px), min(top + size, geometry.size_px)
    if x0 >= x1 or y0 >= y1:
        return
    variant = int(tree.shade * NUM_VARIANTS) + NUM_VARIANTS * tree.is_conifer
    sprite = crown(variant, size=size)[y0 - top : y1 - top, x0 - left : x1 - left]
    colour = leaf_colour(day.season, shade=tree.shade, is_conifer=tree.is_conifer) * np.array(day.gains, np.float32)
    leaf = sprite[..., :1] * (colour * np.float32(day.ambient + 0.85 * day.sun))
    window = image[y0:y1, x0:x1]
    window[...] = np.minimum(window + (leaf - window) * sprite[..., 1:2], 255)
