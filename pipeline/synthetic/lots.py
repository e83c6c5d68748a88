"""Plans of built lots: houses, halls, car parks, gardens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.synthetic.scene import Building, CarSlot, Line, Material, Patch, Points, Rgb, rectangle
from pipeline.synthetic.space import FreeSpace

_GABLE_ROOFS: tuple[Rgb, ...] = (
    (92, 84, 80), (120, 72, 58), (148, 92, 70), (70, 70, 76), (110, 104, 98), (134, 116, 98), (84, 96, 92),
    (58, 56, 58),
)  # fmt: skip
_FLAT_ROOFS: tuple[Rgb, ...] = (
    (196, 194, 188), (150, 148, 146), (112, 110, 110), (222, 220, 214), (164, 150, 132), (128, 136, 140), (92, 94, 98),
)  # fmt: skip
_WALLS: tuple[Rgb, ...] = (
    (212, 202, 184), (226, 222, 214), (166, 92, 72), (184, 168, 140), (196, 174, 110), (150, 164, 176),
    (128, 84, 68), (176, 186, 166), (204, 168, 148), (236, 232, 224), (142, 132, 122), (112, 122, 132),
    (190, 120, 92), (120, 140, 120),
)  # fmt: skip


def _pick(random: np.random.Generator, colours: tuple[Rgb, ...]) -> Rgb:
    chosen = np.array(colours[random.integers(len(colours))]) + random.normal(0, 7, 3)
    red, green, blue = np.clip(chosen, 20, 245).astype(int)
    return int(red), int(green), int(blue)


@dataclass(frozen=True, kw_only=True)
class HousePlan:
    """A house before it has its place: sizes, its distance behind the pavement and the gap to the next one."""

    half_length_m: float
    half_depth_m: float
    eaves_m: float
    rise_m: float
    roof: Rgb
    wall: Rgb
    window_pitch_m: float
    storey_m: float
    setback_m: float
    gap_m: float
    margin_m: float
    twist: float = 0.0
    is_shop: bool = False
    has_drive: bool = False
    is_turned: bool = False

    def placed(self, spot: Points, *, angle: float, side: float) -> Building:
        """Return the building with its middle at a spot; a turned one shows its gable to the street."""
        turn = np.pi / 2 if self.is_turned else 0.0
        halves = (self.half_length_m, self.half_depth_m)
        half_length, half_depth = halves[::-1] if self.is_turned else halves
        return Building(
            float(spot[0]), float(spot[1]), half_length, half_depth, angle + turn * side, self.eaves_m, self.rise_m,
            self.roof, self.wall, self.window_pitch_m, self.storey_m, self.is_shop,
        )  # fmt: skip


HouseMaker = Callable[[np.random.Generator], HousePlan]


def home(random: np.random.Generator) -> HousePlan:
    """Return a detached house with a garden."""
    storeys = 1 + int(random.random() < 0.5) + int(random.random() < 0.08)
    half_depth = random.uniform(3.8, 5.4)
    return HousePlan(
        half_length_m=random.uniform(4.2, 7.8),
        half_depth_m=half_depth,
        eaves_m=0.4 + 2.7 * storeys,
        rise_m=half_depth * random.uniform(0.45, 0.95) if random.random() < 0.9 else 0.0,
        roof=_pick(random, _GABLE_ROOFS),
        wall=_pick(random, _WALLS),
        window_pitch_m=random.uniform(2.2, 3.4),
        storey_m=2.7,
        setback_m=random.uniform(3.5, 8.5),
        gap_m=random.uniform(3.5, 8.0),
        margin_m=1.2,
        twist=random.choice([0.0, 0.0, random.normal(0, 0.06)]),
        has_drive=bool(random.random() < 0.75),
        is_turned=bool(random.random() < 0.3),
    )


def town_house(random: np.random.Generator) -> HousePlan:
    """Return a house of the centre: tall, flat or steep, standing at the pavement."""
    storeys = int(random.choice([2, 3, 3, 4, 4, 5, 6, 8, 11]))
    is_flat = storeys > 4 or random.random() < 0.5
    half_depth = random.uniform(5.5, 9.5)
    return HousePlan(
        half_length_m=random.uniform(5.5, 13.0),
        half_depth_m=half_depth,
        eaves_m=0.8 + 3.2 * storeys,
        rise_m=0.0 if is_flat else half_depth * random.uniform(0.5, 0.8),
        roof=_pick(random, _FLAT_ROOFS if is_flat else _GABLE_ROOFS),
        wall=_pick(random, _WALLS),
        window_pitch_m=random.uniform(1.9, 3.8),
        storey_m=3.2,
        setback_m=random.choice([0.7, 0.9, 3.0]),
        gap_m=random.choice([0.6, 0.6, 5.0, 12.0]),
        margin_m=0.0,
        is_shop=bool(random.random() < 0.6),
    )


def farm_house(random: np.random.Generator) -> HousePlan:
    """Return a farm's house or barn."""
    is_barn = random.random() < 0.5
    half_depth = random.uniform(5.0, 7.5) if is_barn else random.uniform(4.0, 5.0)
    barns: tuple[Rgb, ...] = ((140, 48, 40), (170, 166, 158), (120, 96, 72), (96, 110, 104))
    return HousePlan(
        half_length_m=random.uniform(7.0, 12.0) if is_barn else random.uniform(5.0, 7.0),
        half_depth_m=half_depth,
        eaves_m=random.uniform(3.5, 5.0) if is_barn else 3.2,
        rise_m=half_depth * random.uniform(0.5, 0.9),
        roof=_pick(random, ((168, 168, 170), (112, 64, 52), (90, 92, 96), (150, 140, 128))),
        wall=_pick(random, barns if is_barn else _WALLS),
        window_pitch_m=0.0 if is_barn else 2.8,
        storey_m=2.8,
        setback_m=random.uniform(7.0, 14.0),
        gap_m=random.uniform(12.0, 40.0),
        margin_m=2.0,
        twist=random.normal(0, 0.05),
        has_drive=True,
    )


def halls(random: np.random.Generator, *, space: FreeSpace, middle: Points, angle: float) -> list[Building]:
    """Return up to three large flat halls that find room in the block."""
    found: list[Building] = []
    for _ in range(14):
        half_length, half_depth = random.uniform(9.0, 20.0), random.uniform(6.5, 12.0)
        east, north = middle + random.uniform(-22.0, 22.0, 2)
        turn = angle + random.choice([0.0, np.pi / 2])
        center = (float(east), float(north))
        is_free = space.claim_box(center, half_length=half_length, half_depth=half_depth, angle=turn, margin_m=2.0)
        if is_free and len(found) < 3:
            gable = 0.0 if random.random() < 0.75 else half_depth * 0.22
            pitch = random.choice([0.0, 4.0, 5.0])
            roof, wall = _pick(random, _FLAT_ROOFS), _pick(random, _WALLS)
            eaves = random.uniform(4.5, 9.0)
            sizes = (half_length, half_depth, turn, eaves, gable)
            found.append(Building(*center, *sizes, roof, wall, pitch, 4.2, bool(random.random() < 0.5)))
    return found


def add_more_houses(
    random: np.random.Generator,
    *,
    buildings: list[Building],
    space: FreeSpace,
    maker: HouseMaker,
    count: int,
    angle: float,
) -> None:
    """Add houses behind the front rows wherever they find room."""
    for place in space.random_places(random, count=count):
        plan = maker(random)
        turn = angle + plan.twist + random.choice([0.0, np.pi / 2])
        halves = {"half_length": plan.half_length_m, "half_depth": plan.half_depth_m}
        if space.claim_box((float(place[0]), float(place[1])), **halves, angle=turn, margin_m=1.5):
            buildings.append(plan.placed(place, angle=turn, side=1.0))


def add_car_park(
    random: np.random.Generator,
    *,
    patches: list[Patch],
    lines: list[Line],
    slots: list[CarSlot],
    space: FreeSpace,
    angle: float = 0.0,
) -> None:
    """Add a marked car park where the block has room for one."""
    for place in space.random_places(random, count=60):
        half_length, half_depth = random.uniform(9.0, 17.0), random.choice([8.0, 8.0, 15.5])
        center = (float(place[0]), float(place[1]))
        turn = angle + random.choice([0.0, np.pi / 2])
        if space.claim_box(center, half_length=half_length, half_depth=half_depth, angle=turn, margin_m=0.5):
            break
    else:
        return
    surface = Material.ASPHALT if random.random() < 0.6 else Material.ASPHALT_OLD
    patches.append(Patch(rectangle(center, half_length=half_length, half_depth=half_depth, angle=turn), surface))
    unit, across = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
    chance = random.uniform(0.2, 0.9)
    rows = [-half_depth + 2.6, half_depth - 2.6] + ([-2.4, 2.4] if half_depth > 10 else [])
    for row in rows:
        for step in np.arange(-half_length + 0.5, half_length - 2.0, 2.6):
            foot = place + unit * step + across * row
            lines.append(Line(np.stack([foot - across * 2.4, foot + across * 2.4]), Material.WHITE_LINE, 0.16))
            spot = foot + unit * 1.3
            slots.append(CarSlot(float(spot[0]), float(spot[1]), turn + np.pi / 2, chance))


def add_garden_things(
    random: np.random.Generator, *, patches: list[Patch], buildings: list[Building], space: FreeSpace
) -> None:
    """Add sheds, pools, hedges and beds to the gardens."""
    for place in space.random_places(random, count=int(random.integers(6, 22))):
        center, angle = (float(place[0]), float(place[1])), random.uniform(0, np.pi)
        kind = random.random()
        half_length, half_depth = random.uniform(1.4, 4.2), random.uniform(1.2, 2.2)
        if kind > 0.75:
            half_length, half_depth = random.uniform(4.0, 9.0), 0.5
        if not space.claim_box(center, half_length=half_length, half_depth=half_depth, angle=angle, margin_m=0.6):
            continue
        box = rectangle(center, half_length=half_length, half_depth=half_depth, angle=angle)
        if kind < 0.3:
            roof, wall = _pick(random, _GABLE_ROOFS), _pick(random, _WALLS)
            sizes = (half_length, half_depth, angle, 2.2, half_depth * 0.5)
            buildings.append(Building(*center, *sizes, roof, wall, 0.0, 2.4, False))
        elif kind > 0.75:
            patches.append(Patch(box, Material.HEDGE, random.uniform(1.0, 2.2)))
        else:
            patches.append(
                Patch(box, Material.POOL if kind < 0.42 else Material.SOIL if kind < 0.6 else Material.PLAZA)
            )
