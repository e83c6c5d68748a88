"""What stands in one block of the town, by its zone; each block follows from (seed, lattice place) alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from pipeline.synthetic import land, lots
from pipeline.synthetic.markings import along, length_m
from pipeline.synthetic.noise import generator
from pipeline.synthetic.scene import Building, CarSlot, Line, Material, Patch, Points, Street, Tree
from pipeline.synthetic.space import FreeSpace
from pipeline.synthetic.streets import bare_street, centre_line, rivers, urbanity


@dataclass(kw_only=True)
class Block:
    """The contents of one block, in the order in which they are painted."""

    zone: str
    patches: list[Patch] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    buildings: list[Building] = field(default_factory=list)
    trees: list[Tree] = field(default_factory=list)
    slots: list[CarSlot] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Frontage:
    """One street side of a block: the kerb-side line that its houses face.

    Attributes:
        road: The street.
        side: +1 if the block lies to the left of the street's direction, -1 to the right.
    """

    road: Street
    side: float

    def spot(self, at_m: float, *, behind_m: float) -> tuple[Points, float]:
        """Return the place `behind_m` behind the pavement at a distance along the street, and the street's angle."""
        places, tangents = along(self.road.points, np.array([at_m]))
        tangent = tangents[0]
        normal = np.array([-tangent[1], tangent[0]]) * self.side
        offset = self.road.width_m / 2 + self.road.pavement_m + behind_m
        return places[0] + normal * offset, float(np.arctan2(tangent[1], tangent[0]))


def _frontages(seed: int, i: int, j: int) -> list[Frontage]:
    edges = [(i, j, "east", 1.0), (i + 1, j, "north", 1.0), (i, j + 1, "east", -1.0), (i, j, "north", -1.0)]
    found = [(bare_street(seed, a, b, axis=axis), side) for a, b, axis, side in edges]
    slanted = bare_street(seed, i, j, axis="diagonal")
    return [Frontage(road=road, side=side) for road, side in [*found, (slanted, 1.0), (slanted, -1.0)] if road]


def outline_of(seed: int, i: int, j: int) -> Points:
    """Return the block's border along the centre lines of its four sides, [n, 2]."""
    south, north = centre_line(seed, i, j, axis="east"), centre_line(seed, i, j + 1, axis="east")
    west, east = centre_line(seed, i, j, axis="north"), centre_line(seed, i + 1, j, axis="north")
    return np.concatenate([south[:-1], east[:-1], north[:0:-1], west[:0:-1]])


def zone_of(seed: int, i: int, j: int) -> str:
    """Return the block's use; dense in the centre, fields and woods outside, with exceptions."""
    middle = outline_of(seed, i, j).mean(axis=0, keepdims=True)
    dense = urbanity(seed, middle)
    draw = generator(seed, "zone", i, j).random()
    if dense > 0.95:
        return "centre" if draw < 0.72 else "retail" if draw < 0.87 else "park"
    if dense > -0.35:
        return "homes" if draw < 0.62 else "retail" if draw < 0.78 else "park" if draw < 0.92 else "woods"
    return "farm" if draw < 0.45 else "woods" if draw < 0.68 else "homes" if draw < 0.9 else "park"


_GROUND = {
    "centre": (Material.PLAZA, Material.LAWN),
    "homes": (Material.LAWN, Material.LAWN, Material.MEADOW),
    "retail": (Material.ASPHALT_OLD, Material.GRAVEL, Material.MEADOW),
    "park": (Material.LAWN, Material.MEADOW),
    "farm": (Material.MEADOW,),
    "woods": (Material.MEADOW,),
}


@lru_cache(maxsize=1024)
def block(seed: int, i: int, j: int) -> Block:
    """Make one block of the town."""
    random = generator(seed, "block", i, j)
    outline = outline_of(seed, i, j)
    middle = outline.mean(axis=0)
    fronts = _frontages(seed, i, j)
    waters = rivers(seed, (float(middle[0]), float(middle[1])), reach_m=80.0)
    zone = zone_of(seed, i, j)
    made = Block(zone=zone)
    grounds = _GROUND[zone]
    made.patches.append(Patch(outline, grounds[random.integers(len(grounds))]))
    space = FreeSpace(outline, streets=[front.road for front in fronts], waters=waters)
    if zone == "centre":
        _centre(random, made=made, space=space, fronts=fronts)
    elif zone == "homes":
        _homes(random, made=made, space=space, fronts=fronts)
    elif zone == "retail":
        _retail(random, made=made, space=space, fronts=fronts, middle=middle)
    elif zone == "park":
        land.fill_park(random, patches=made.patches, lines=made.lines, trees=made.trees, space=space, middle=middle)
    elif zone == "farm":
        _farm(random, made=made, space=space, fronts=fronts, outline=outline)
    else:
        land.fill_woods(random, patches=made.patches, trees=made.trees, space=space)
    return made


def _row_of_houses(
    random: np.random.Generator, *, made: Block, space: FreeSpace, front: Frontage, maker: lots.HouseMaker
) -> None:
    """Set houses side by side along one street side, each where it finds room."""
    at, end = random.uniform(9.0, 14.0), length_m(front.road.points) - 9.0
    while at < end:
        plan = maker(random)
        spot, angle = front.spot(at + plan.half_length_m, behind_m=plan.setback_m + plan.half_depth_m)
        house = plan.placed(spot, angle=angle + plan.twist, side=front.side)
        half_length, half_depth = plan.half_length_m, plan.half_depth_m
        center = (house.east_m, house.north_m)
        if space.claim_box(
            center, half_length=half_length, half_depth=half_depth, angle=angle + plan.twist, margin_m=plan.margin_m
        ):
            made.buildings.append(house)
            if plan.has_drive:
                _drive(random, made=made, space=space, front=front, at=at + 2 * half_length + 1.6)
        at += 2 * half_length + plan.gap_m


def _drive(random: np.random.Generator, *, made: Block, space: FreeSpace, front: Frontage, at: float) -> None:
    (start, angle), (end, _) = front.spot(at, behind_m=-0.2), front.spot(at, behind_m=random.uniform(9.0, 14.0))
    middle = (start + end) / 2
    half = float(np.hypot(*(end - start))) / 2
    if not space.is_free(np.stack([middle, end])).all():
        return
    material = (Material.PAVEMENT, Material.GRAVEL, Material.ASPHALT_OLD)[random.integers(3)]
    made.lines.append(Line(np.stack([start, end]), material, 3.0))
    space.claim_box(
        (float(middle[0]), float(middle[1])),
        half_length=max(half - 1.5, 1.0),
        half_depth=1.4,
        angle=angle + np.pi / 2,
        margin_m=0.0,
    )
    made.slots.append(CarSlot(float(end[0]), float(end[1]), angle + np.pi / 2, 0.5))


def _centre(random: np.random.Generator, *, made: Block, space: FreeSpace, fronts: list[Frontage]) -> None:
    for front in fronts:
        _row_of_houses(random, made=made, space=space, front=front, maker=lots.town_house)
    angle = fronts[0].spot(40.0, behind_m=0.0)[1] if fronts else 0.0
    more = int(random.integers(0, 14))
    lots.add_more_houses(random, buildings=made.buildings, space=space, maker=lots.town_house, count=more, angle=angle)
    lots.add_car_park(random, patches=made.patches, lines=made.lines, slots=made.slots, space=space)
    _street_trees(random, made=made, fronts=fronts, chance=0.5)
    land.add_trees(random, trees=made.trees, space=space, count=14, conifers=0.05)


def _homes(random: np.random.Generator, *, made: Block, space: FreeSpace, fronts: list[Frontage]) -> None:
    for front in fronts:
        _row_of_houses(random, made=made, space=space, front=front, maker=lots.home)
    angle = fronts[0].spot(40.0, behind_m=0.0)[1] if fronts else 0.0
    more = int(random.integers(0, 10))
    lots.add_more_houses(random, buildings=made.buildings, space=space, maker=lots.home, count=more, angle=angle)
    lots.add_garden_things(random, patches=made.patches, buildings=made.buildings, space=space)
    _street_trees(random, made=made, fronts=fronts, chance=random.choice([0.0, 0.25, 0.6]))
    land.add_trees(random, trees=made.trees, space=space, count=int(random.integers(15, 60)), conifers=0.25)


def _retail(
    random: np.random.Generator, *, made: Block, space: FreeSpace, fronts: list[Frontage], middle: Points
) -> None:
    angle = fronts[0].spot(40.0, behind_m=0.0)[1] if fronts else 0.0
    made.buildings += lots.halls(random, space=space, middle=middle, angle=angle)
    for _ in range(2):
        lots.add_car_park(random, patches=made.patches, lines=made.lines, slots=made.slots, space=space, angle=angle)
    _street_trees(random, made=made, fronts=fronts, chance=0.2)
    land.add_trees(random, trees=made.trees, space=space, count=10, conifers=0.1)


def _farm(
    random: np.random.Generator, *, made: Block, space: FreeSpace, fronts: list[Frontage], outline: Points
) -> None:
    made.patches += land.fields(random, outline=outline)
    for front in fronts[: int(random.integers(0, 2))]:
        _row_of_houses(random, made=made, space=space, front=front, maker=lots.farm_house)
    _street_trees(random, made=made, fronts=fronts[:2], chance=random.choice([0.0, 0.0, 0.5]))
    land.add_trees(random, trees=made.trees, space=space, count=int(random.integers(0, 12)), conifers=0.2)


def _street_trees(random: np.random.Generator, *, made: Block, fronts: list[Frontage], chance: float) -> None:
    for front in fronts:
        conifer = bool(random.random() < 0.1)
        size = random.uniform(1.8, 3.4)
        for at in np.arange(11.0, length_m(front.road.points) - 9.0, random.uniform(8.0, 13.0)):
            if random.random() < chance:
                spot, _ = front.spot(float(at), behind_m=1.4 - 0.5 * (front.road.pavement_m > 2))
                radius = size * random.uniform(0.8, 1.2)
                height = radius * random.uniform(2.2, 2.9)
                made.trees.append(Tree(float(spot[0]), float(spot[1]), radius, height, conifer, random.random()))
