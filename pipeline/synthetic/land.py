"""What grows: trees, parks with their ponds and paths, fields, woods."""

from __future__ import annotations

import numpy as np

from pipeline.synthetic.scene import Line, Material, Patch, Points, Tree, rectangle
from pipeline.synthetic.space import FreeSpace


def add_trees(random: np.random.Generator, *, trees: list[Tree], space: FreeSpace, count: int, conifers: float) -> None:
    """Add trees of the gardens wherever it is free."""
    for east, north in space.random_places(random, count=count):
        is_conifer = bool(random.random() < conifers)
        radius = random.uniform(1.4, 2.4) if is_conifer else random.uniform(1.6, 4.6)
        height = radius * (random.uniform(3.2, 4.6) if is_conifer else random.uniform(1.9, 2.8))
        trees.append(Tree(float(east), float(north), radius, height, is_conifer, random.random()))


def blob(random: np.random.Generator, *, center: Points, radius_m: float) -> Points:
    """Return a rounded irregular outline, [32, 2]."""
    angle = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    radius = np.full(32, radius_m)
    for k in (2, 3, 4):
        radius *= 1 + random.uniform(0, 0.4 / k) * np.sin(k * angle + random.uniform(0, 2 * np.pi))
    rim: Points = np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]
    return center + rim * random.uniform(0.8, 1.25, 2)


def fill_park(
    random: np.random.Generator,
    *,
    patches: list[Patch],
    lines: list[Line],
    trees: list[Tree],
    space: FreeSpace,
    middle: Points,
) -> None:
    """Fill a block with a pond, paths, a sports court and trees."""
    if random.random() < 0.55:
        pond = blob(random, center=middle + random.uniform(-14, 14, 2), radius_m=random.uniform(8.0, 17.0))
        if space.claim(pond, margin_m=1.5):
            bank = middle + (pond - pond.mean(axis=0)) * 1.1 + (pond.mean(axis=0) - middle)
            patches += [Patch(bank, Material.SAND), Patch(pond, Material.WATER)]
    for place in space.random_places(random, count=12 if random.random() < 0.5 else 0):
        turn = random.uniform(0, np.pi)
        center = (float(place[0]), float(place[1]))
        if space.claim_box(center, half_length=14.0, half_depth=7.5, angle=turn, margin_m=1.0):
            surface = Material.COURT_RED if random.random() < 0.5 else Material.COURT_GREEN
            patches.append(Patch(rectangle(center, half_length=14.0, half_depth=7.5, angle=turn), surface))
            inner = rectangle(center, half_length=12.0, half_depth=5.5, angle=turn)
            lines.append(Line(np.concatenate([inner, inner[:1]]), Material.WHITE_LINE, 0.2))
            lines.append(Line((inner[[0, 2]] + inner[[1, 3]]) / 2, Material.WHITE_LINE, 0.2))
            break
    heading = random.uniform(0, np.pi)
    for turn in (heading, heading + random.uniform(0.7, 2.2)):
        unit = np.array([np.cos(turn), np.sin(turn)])
        steps = np.linspace(-48, 48, 40)
        swing = random.uniform(2, 8) * np.sin(steps / random.uniform(8, 16))
        path = middle + steps[:, None] * unit + swing[:, None] * np.array([-unit[1], unit[0]])
        material = Material.SAND if random.random() < 0.6 else Material.PAVEMENT
        free = space.is_free(path)
        for run in np.split(np.arange(len(path)), np.flatnonzero(np.diff(free)) + 1):
            if free[run[0]] and len(run) > 4:
                lines.append(Line(path[run], material, 2.2))
    add_trees(random, trees=trees, space=space, count=int(random.integers(15, 80)), conifers=random.choice([0.1, 0.6]))


def fields(random: np.random.Generator, *, outline: Points) -> list[Patch]:
    """Return the block cut into strips of crops."""
    kinds = (Material.FIELD_GREEN, Material.FIELD_GOLD, Material.FIELD_SOIL, Material.FIELD_MOWN)
    chosen = random.permutation(4)[: random.integers(1, 4)]
    low, high = np.array(sorted(random.random(2))) * 0.1
    corners = [outline[0], outline[16], outline[32], outline[48]]
    if random.random() < 0.5:
        corners = corners[1:] + corners[:1]
    cuts = np.linspace(low, 1 - high, len(chosen) + 1)
    south, north = (corners[0], corners[1]), (corners[3], corners[2])
    found = [Patch(outline, kinds[chosen[0]])]
    for k in range(1, len(chosen)):
        ends = [side[0] + (side[1] - side[0]) * cut for side, cut in ((south, cuts[k]), (south, 1.0))]
        ends += [side[0] + (side[1] - side[0]) * cut for side, cut in ((north, 1.0), (north, cuts[k]))]
        found.append(Patch(np.array(ends), kinds[chosen[k]]))
    return found


def fill_woods(random: np.random.Generator, *, patches: list[Patch], trees: list[Tree], space: FreeSpace) -> None:
    """Fill a block with closed forest, its edge of single trees."""
    height = random.uniform(6.0, 12.0)
    conifers = random.choice([0.1, 0.4, 0.9])
    inset = random.uniform(3.0, 9.0)
    for region in space.regions(inset_m=inset):
        ragged = region + random.normal(0, 0.8, region.shape)
        patches.append(Patch(ragged, Material.WOOD, height))
        for east, north in ragged[:: int(random.integers(1, 3))]:
            radius = random.uniform(1.6, 3.2)
            trees.append(Tree(float(east), float(north), radius, height * random.uniform(0.8, 1.3),
                              bool(random.random() < conifers), random.random()))  # fmt: skip
