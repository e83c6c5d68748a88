"""Writes the town in a raw layout, over several processes, to be continued where it was stopped.

Beside the layout's own files (see `lists`) there is `town.json`, which says which town it is.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from cvft.configuration import require
from cvft.errors import DataError
from pipeline.schema import TEST, TRAIN, VAL
from pipeline.synthetic.aerial import render_aerial
from pipeline.synthetic.canvas import paint, with_cars
from pipeline.synthetic.geometry import AerialGeometry, PanoramaGeometry
from pipeline.synthetic.light import draw_day
from pipeline.synthetic.lists import FOLDERS, TownLayout, cvact_lists, cvusa_lists, image_paths
from pipeline.synthetic.noise import generator
from pipeline.synthetic.panorama import render_panorama
from pipeline.synthetic.places import REACH_M, Place, plan_places
from pipeline.synthetic.town import cars_of_a_day, scene_at

_VERSION = 3  # raise it when the same configuration gives other images
_CHUNK = 8
_PREPARED_PX = ((112, 616), (256, 256))  # ground, aerial
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class CvactConfig:
    """What a town in CVACT's layout has besides.

    Attributes:
        num_test: Pairs of the test half besides those of val, which it holds once more.
        num_without_files: Ids that each split's list names besides and that have no images.
        is_prepared: Write 616x112 and 256x256 PNGs, as users prepare them, instead of JPEGs as rendered.
    """

    num_test: int = 0
    num_without_files: int = 0
    is_prepared: bool = False

    def __post_init__(self) -> None:
        for name in ("num_test", "num_without_files"):
            require(getattr(self, name) >= 0, f"cvact.{name}: {getattr(self, name)} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class TownConfig:
    """A town and the images taken of it.

    Attributes:
        num_pairs: Pairs of train and val together; the town grows with it.
        seed: Another seed is another town.
        val_fraction: Share of pairs in the val split.
        aerial: Size and extent of the aerial images.
        panorama: Size and camera height of the panoramas.
        jpeg_quality: Quality of both.
        cvact: Write CVACT's layout; CVUSA's if none.
    """

    num_pairs: int
    seed: int = 0
    val_fraction: float = 0.25
    aerial: AerialGeometry = field(default_factory=AerialGeometry)
    panorama: PanoramaGeometry = field(default_factory=PanoramaGeometry)
    jpeg_quality: int = 90
    cvact: CvactConfig | None = None

    def __post_init__(self) -> None:
        reach = 2 * REACH_M
        require(1 <= self.num_pairs <= 9_999_999, f"num_pairs: {self.num_pairs} must lie in [1, 9999999]: 7 digits")
        require(0 <= self.val_fraction < 1, f"val_fraction: {self.val_fraction} must lie in [0, 1)")
        require(self.seed >= 0, f"seed: {self.seed} must be 0 or more")
        require(0 < self.aerial.extent_m <= reach, f"aerial.extent_m: {self.aerial.extent_m} must lie in (0, {reach}]")

    @property
    def layout(self) -> TownLayout:
        """The raw layout that is written."""
        return "cvact" if self.cvact else "cvusa"

    @property
    def num_val(self) -> int:
        """Pairs of the val split."""
        return round(self.num_pairs * self.val_fraction)


def cvact_town(*, num_pairs: int, seed: int = 0, cvact: CvactConfig) -> TownConfig:
    """Return a town in CVACT's layout with the sizes of its originals, or what prepared sets are made of."""
    if cvact.is_prepared:
        panorama, aerial = PanoramaGeometry(width_px=616, height_px=154), AerialGeometry()
    else:
        panorama, aerial = PanoramaGeometry(width_px=1664, height_px=832), AerialGeometry(size_px=1200)
    return TownConfig(num_pairs=num_pairs, seed=seed, panorama=panorama, aerial=aerial, cvact=cvact)


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
    places = _plan(config)
    todo = [place for place in places if not all(path.exists() for path in chain(*_files(out, config, place)))]
    done = len(places) - len(todo)
    if progress:
        progress(done, len(places))
    for finished in _render_all(out, config, todo, workers=workers or os.cpu_count() or 1):
        done += finished
        if progress:
            progress(done, len(places))
    for name, data in _lists(config, places).items():
        _publish(out / name, data)
    splits = (TRAIN, VAL, TEST) if config.cvact else (TRAIN, VAL)
    counts = {split: sum(place.split == split for place in places) for split in splits}
    if config.cvact:
        counts[TEST] += counts[VAL]
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


def _plan(config: TownConfig) -> list[Place]:
    return plan_places(
        config.seed,
        num_train=config.num_pairs - config.num_val,
        num_val=config.num_val,
        num_test=config.cvact.num_test if config.cvact else 0,
        extent_m=config.aerial.extent_m,
    )


def _lists(config: TownConfig, places: Sequence[Place]) -> dict[str, bytes]:
    if config.cvact:
        return cvact_lists(config.seed, places, num_without_files=config.cvact.num_without_files)
    return cvusa_lists(config.seed, places)


def _files(out: Path, config: TownConfig, place: Place) -> tuple[list[Path], list[Path]]:
    """Return the files of the panorama and those of the aerial image, which hold the same bytes."""
    suffix = ".png" if config.cvact and config.cvact.is_prepared else ".jpg"
    ground, aerial = image_paths(config.layout, place, seed=config.seed, suffix=suffix)
    return [out / path for path in ground], [out / path for path in aerial]


def _claim(out: Path, config: TownConfig) -> str:
    """Say in the folder which town it holds, before any image."""
    told = {"version": _VERSION, **asdict(config)}
    if config.cvact is None:
        del told["cvact"]  # so that towns written before there was a choice stay what they are
    text = json.dumps(told, indent=2, sort_keys=True) + "\n"
    path = out / "town.json"
    if path.exists():
        if path.read_text() != text:
            raise DataError(f"{out} holds another town (see {path}); choose another folder or delete this one")
    elif any((out / folder.partition("/")[0]).exists() for folder in FOLDERS[config.layout]):
        raise DataError(f"{out} holds images that are no synthetic town (no town.json); choose another folder")
    for folder in FOLDERS[config.layout]:
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
        images = render_pair(config, place)
        for paths, image, prepared_px in zip(_files(out, config, place), images, _PREPARED_PX, strict=True):
            data = _encode(config, image, prepared_px=prepared_px)
            for path in paths:
                _publish(path, data)
    return len(places)


def _encode(config: TownConfig, image: NDArray[np.uint8], *, prepared_px: tuple[int, int]) -> bytes:
    if not (config.cvact and config.cvact.is_prepared):
        return bytes(simplejpeg.encode_jpeg(image, quality=config.jpeg_quality, colorspace="RGB"))
    stream = io.BytesIO()
    Image.fromarray(cv2.resize(image, prepared_px[::-1], interpolation=cv2.INTER_AREA)).save(stream, "PNG")
    return stream.getvalue()
