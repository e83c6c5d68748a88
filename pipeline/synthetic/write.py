"""Writes the town in CVUSA's raw layout, over several processes, to be continued where it was stopped.

out/bingmap/19/NNNNNNN.jpg, out/streetview/panos/NNNNNNN.jpg
out/splits/{train,val}-19zl.csv, out/split_locations/all.csv, out/town.json
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from cvft.configuration import require
from cvft.errors import DataError
from pipeline.schema import TRAIN, VAL
from pipeline.synthetic.aerial import render_aerial
from pipeline.synthetic.canvas import paint, with_cars
from pipeline.synthetic.geometry import AerialGeometry, LocalPlane, PanoramaGeometry
from pipeline.synthetic.light import draw_day
from pipeline.synthetic.noise import generator
from pipeline.synthetic.panorama import render_panorama
from pipeline.synthetic.places import REACH_M, Place, plan_places
from pipeline.synthetic.town import cars_of_a_day, scene_at

_VERSION = 3  # raise it when the same configuration gives other images
_CHUNK = 8
_AERIAL, _GROUND = "bingmap/19", "streetview/panos"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class TownConfig:
    """A town and the images taken of it.

    Attributes:
        num_pairs: Pairs of both splits together; the town grows with it.
        seed: Another seed is another town.
        val_fraction: Share of pairs in the val split.
        aerial: Size and extent of the aerial images.
        panorama: Size and camera height of the panoramas.
        jpeg_quality: Quality of both.
    """

    num_pairs: int
    seed: int = 0
    val_fraction: float = 0.25
    aerial: AerialGeometry = field(default_factory=AerialGeometry)
    panorama: PanoramaGeometry = field(default_factory=PanoramaGeometry)
    jpeg_quality: int = 90

    def __post_init__(self) -> None:
        reach = 2 * REACH_M
        require(1 <= self.num_pairs <= 9_999_999, f"num_pairs: {self.num_pairs} must lie in [1, 9999999]: 7 digits")
        require(0 <= self.val_fraction < 1, f"val_fraction: {self.val_fraction} must lie in [0, 1)")
        require(self.seed >= 0, f"seed: {self.seed} must be 0 or more")
        require(0 < self.aerial.extent_m <= reach, f"aerial.extent_m: {self.aerial.extent_m} must lie in (0, {reach}]")

    @property
    def num_val(self) -> int:
        """Pairs of the val split."""
        return round(self.num_pairs * self.val_fraction)


@dataclass(frozen=True, kw_only=True)
class TownSummary:
    """What lies in the folder now.

    Attributes:
        num_pairs: Pairs by split.
        num_written: Pairs rendered by this call; the others were there.
        fingerprint: Identity of the town: same fingerprint, same bytes.
        seconds: Time of this call.
    """

    num_pairs: dict[str, int]
    num_written: int
    fingerprint: str
    seconds: float


def write_town(
    out: Path, *, config: TownConfig, workers: int | None = None, progress: Progress | None = None
) -> TownSummary:
    """Write a town; files of the same town that are there are kept, and the bytes do not depend on the workers.

    Args:
        out: The folder, made if absent.
        config: The town.
        workers: Processes; all cores if none.
        progress: Called with (pairs there, pairs in all).

    Raises:
        DataError: The folder holds another town or images of another origin.
    """
    began = time.monotonic()
    fingerprint = _claim(out, config)
    num_train, extent_m = config.num_pairs - config.num_val, config.aerial.extent_m
    places = plan_places(config.seed, num_train=num_train, num_val=config.num_val, extent_m=extent_m)
    todo = [place for place in places if not all(path.exists() for path in _files(out, place))]
    done = len(places) - len(todo)
    if progress:
        progress(done, len(places))
    for finished in _render_all(out, config, todo, workers=workers or os.cpu_count() or 1):
        done += finished
        if progress:
            progress(done, len(places))
    _write_lists(out, config, places)
    counts = {split: sum(place.split == split for place in places) for split in (TRAIN, VAL)}
    seconds = time.monotonic() - began
    return TownSummary(num_pairs=counts, num_written=len(todo), fingerprint=fingerprint, seconds=seconds)


def render_pair(config: TownConfig, place: Place) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return (panorama, aerial) of one place, RGB uint8; each on a day of its own."""
    px_per_m = config.aerial.px_per_m
    size = 2 * int(REACH_M * px_per_m)
    center = (place.east_m, place.north_m)
    scene = scene_at(config.seed, center, reach_m=REACH_M)
    canvas = paint(scene, size_px=size, px_per_m=px_per_m)
    random = generator(config.seed, "aerial day", place.number)
    day, cars = draw_day(random, is_clear=True), cars_of_a_day(scene, random, clear_m=0.0)
    aerial = render_aerial(scene, with_cars(canvas, cars), day=day, geometry=config.aerial)
    random = generator(config.seed, "ground day", place.number)
    day, cars = draw_day(random, is_clear=False), cars_of_a_day(scene, random, clear_m=5.5)
    view = with_cars(canvas, cars)
    ground = render_panorama(scene, view, day=day, geometry=config.panorama, random=random)
    return ground, aerial


def _files(out: Path, place: Place) -> tuple[Path, Path]:
    name = f"{place.number:07d}.jpg"
    return out / _GROUND / name, out / _AERIAL / name


def _claim(out: Path, config: TownConfig) -> str:
    """Say in the folder which town it holds, before any image."""
    told = {"version": _VERSION, **asdict(config)}
    text = json.dumps(told, indent=2, sort_keys=True) + "\n"
    path = out / "town.json"
    if path.exists():
        if path.read_text() != text:
            raise DataError(f"{out} holds another town (see {path}); choose another folder or delete this one")
    elif (out / "bingmap").exists() or (out / "streetview").exists():
        raise DataError(f"{out} holds images that are no synthetic town (no town.json); choose another folder")
    for folder in (_AERIAL, _GROUND, "splits", "split_locations"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    _publish(path, text.encode())
    return hashlib.sha256(text.encode()).hexdigest()


def _publish(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)


def _render_all(out: Path, config: TownConfig, places: Sequence[Place], *, workers: int) -> Iterator[int]:
    """Render places and yield how many each finished chunk held; chunks are neighbours, which share their blocks."""
    chunks = [places[start : start + _CHUNK] for start in range(0, len(places), _CHUNK)]
    workers = min(workers, len(chunks))
    if workers <= 1:
        with _one_thread():
            for chunk in chunks:
                yield _render_chunk(out, config, chunk)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        for future in as_completed([pool.submit(_render_chunk, out, config, chunk) for chunk in chunks]):
            yield future.result()


@contextmanager
def _one_thread() -> Iterator[None]:
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _render_chunk(out: Path, config: TownConfig, places: Sequence[Place]) -> int:
    for place in places:
        for path, image in zip(_files(out, place), render_pair(config, place), strict=True):
            _publish(path, simplejpeg.encode_jpeg(image, quality=config.jpeg_quality, colorspace="RGB"))
    return len(places)


def _write_lists(out: Path, config: TownConfig, places: Sequence[Place]) -> None:
    """Write the split files and the locations: requested point (some metres off), own position, heading."""
    numbered = sorted(places)
    for split in (TRAIN, VAL):
        rows = [f"{place.number:07d}" for place in places if place.split == split]
        lines = [f"{_AERIAL}/{row}.jpg,{_GROUND}/{row}.jpg,streetview/annotations/{row}.png\n" for row in rows]
        _publish(out / "splits" / f"{split}-19zl.csv", "".join(lines).encode())
    random = generator(config.seed, "requested")
    own = np.array([(place.east_m, place.north_m) for place in numbered])
    turn, off = random.uniform(0, 2 * np.pi, len(own)), random.uniform(1.0, 9.0, len(own))
    asked = own + np.stack([np.sin(turn), np.cos(turn)], axis=1) * off[:, None]
    plane = LocalPlane()
    columns = [*plane.to_degrees(*asked.T), *plane.to_degrees(*own.T), [place.heading_deg for place in numbered]]
    lines = ["{:.8f},{:.8f},{:.8f},{:.8f},{:.6f}\n".format(*row) for row in zip(*columns, strict=True)]
    _publish(out / "split_locations" / "all.csv", "".join(lines).encode())
