"""Where the town's cameras stand: on its streets, apart from each other, train and val on separate sides of the map.

Shapes: N = num_pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.schema import TEST, TRAIN, VAL
from pipeline.synthetic.markings import along, length_m
from pipeline.synthetic.noise import generator
from pipeline.synthetic.streets import bare_street

MIN_APART_M = 12.0
REACH_M = 80.0  # as far as a panorama sees
_PLACES_PER_BLOCK = 7.0


class Place(NamedTuple):
    """One camera: `number` is CVUSA's id, `heading_deg` the way that it drives (panoramas look north anyway)."""

    number: int
    split: str
    east_m: float
    north_m: float
    heading_deg: float


def _candidates(seed: int, i: int, j: int) -> Iterator[tuple[float, float, float]]:
    for axis in ("east", "north", "diagonal"):
        road = bare_street(seed, i, j, axis=axis)
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


def plan_places(seed: int, *, num_train: int, num_val: int, extent_m: float, num_test: int = 0) -> list[Place]:
    """Return all cameras in an order in which neighbours follow each other.

    The train split takes columns of blocks from the west until it is full; val starts where nothing that a train image
    shows can be seen any more, and test likewise beyond val. Ids are shuffled over all, as in CVUSA.

    Args:
        seed: The town.
        num_train: Places of the train split.
        num_val: Places of the val split.
        extent_m: Width of the aerial images.
        num_test: Places of the test split.
    """
    rows = int(np.ceil(np.sqrt((num_train + num_val + num_test) / _PLACES_PER_BLOCK)))
    margin_m = REACH_M + max(REACH_M, extent_m / 2)
    apart, chosen, border = _Apart(), [], -np.inf
    columns = count()
    for split, number in ((TRAIN, num_train), (VAL, num_val), (TEST, num_test)):
        found: list[tuple[str, float, float, float]] = []
        while len(found) < number:
            i = next(columns)
            spots = [spot for j in range(rows) for spot in _candidates(seed, i, j)]
            found += [(split, *spot) for spot in spots if spot[0] > border and apart.accept(spot[0], spot[1])]
        chosen += found[:number]
        border = max((place[1] for place in found[:number]), default=-np.inf) + margin_m
    numbers: NDArray[np.int64] = generator(seed, "ids").permutation(len(chosen)) + 1
    return [Place(int(number), *place) for number, place in zip(numbers, chosen, strict=True)]
