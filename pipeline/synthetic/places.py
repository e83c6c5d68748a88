"""Where the town's cameras stand: on its streets, apart from each other, train and val on separate sides of the map.

Shapes: N = num_pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cvft.errors import ConfigError
from pipeline.schema import TRAIN, VAL
from pipeline.synthetic.geometry import AerialGeometry, PanoramaGeometry
from pipeline.synthetic.noise import generator
from pipeline.synthetic.streets import along, length_m, street

MIN_APART_M = 12.0
REACH_M = 80.0  # as far as a panorama sees
_PLACES_PER_BLOCK = 7.0


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
    aerial: AerialGeometry = AerialGeometry()
    panorama: PanoramaGeometry = PanoramaGeometry()
    jpeg_quality: int = 90

    def __post_init__(self) -> None:
        if not 1 <= self.num_pairs <= 9_999_999:
            raise ConfigError(f"num_pairs={self.num_pairs} does not fit CVUSA's seven digits; choose 1 to 9999999")
        if not 0.0 <= self.val_fraction < 1.0:
            raise ConfigError(
                f"val_fraction={self.val_fraction} leaves nothing to train on; choose 0 or more, less than 1"
            )
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} is negative; choose 0 or more")
        if not 0 < self.aerial.extent_m <= 2 * REACH_M:
            raise ConfigError(
                f"aerial.extent_m={self.aerial.extent_m} is not within what is built; choose up to {2 * REACH_M}"
            )

    @property
    def num_val(self) -> int:
        """Pairs of the val split."""
        return round(self.num_pairs * self.val_fraction)


class Place(NamedTuple):
    """One camera: `number` is its id in CVUSA's sense, `heading_deg` the way it drives (panoramas look north anyway)."""

    number: int
    split: str
    east_m: float
    north_m: float
    heading_deg: float


def _candidates(seed: int, i: int, j: int) -> Iterator[tuple[float, float, float]]:
    for axis in ("east", "north", "diagonal"):
        road = street(seed, i, j, axis=axis)
        if road is None:
            continue
        random = generator(seed, f"places {axis}", i, j)
        stops = np.cumsum(random.uniform(13.0, 20.0, 12)) - 6.0
        places, tangents = along(road.points, stops[stops < length_m(road.points) - 7.0])
        for (east, north), (along_east, along_north) in zip(places, tangents, strict=True):
            way = 1.0 if random.random() < 0.5 else -1.0
            aside = way * road.width_m * random.uniform(0.15, 0.28)  # one drives on the right
            heading = np.degrees(np.arctan2(way * along_east, way * along_north)) % 360.0
            yield float(east + aside * along_north), float(north - aside * along_east), float(heading)


class _Apart:
    """Accepts places that keep their distance from those accepted before."""

    def __init__(self) -> None:
        self._cells: dict[tuple[int, int], list[tuple[float, float]]] = {}

    def accept(self, east: float, north: float) -> bool:
        column, row = int(east // MIN_APART_M), int(north // MIN_APART_M)
        for a, b in product((-1, 0, 1), repeat=2):
            for other in self._cells.get((column + a, row + b), []):
                if np.hypot(other[0] - east, other[1] - north) < MIN_APART_M:
                    return False
        self._cells.setdefault((column, row), []).append((east, north))
        return True


def plan_places(config: TownConfig) -> list[Place]:
    """Return all cameras in an order in which neighbours follow each other.

    The train split takes columns of blocks from the west until it is full; val starts where nothing that a train image shows
    can be seen any more. Ids are shuffled over both, as in CVUSA.
    """
    rows = int(np.ceil(np.sqrt(config.num_pairs / _PLACES_PER_BLOCK)))
    wanted = {TRAIN: config.num_pairs - config.num_val, VAL: config.num_val}
    margin_m = REACH_M + max(REACH_M, config.aerial.extent_m / 2)
    apart, chosen, border = _Apart(), [], -np.inf
    columns = count()
    for split, number in wanted.items():
        found: list[tuple[str, float, float, float]] = []
        while len(found) < number:
            i = next(columns)
            for j in range(rows):
                for east, north, heading in _candidates(config.seed, i, j):
                    if east > border and apart.accept(east, north):
                        found.append((split, east, north, heading))
        chosen += found[:number]
        border = max((place[1] for place in found[:number]), default=-np.inf) + margin_m
    numbers: NDArray[np.int64] = generator(config.seed, "ids").permutation(config.num_pairs) + 1
    return [Place(int(number), *place) for number, place in zip(numbers, chosen, strict=True)]
