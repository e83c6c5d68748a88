"""Pictures that occur twice: within a split, or in training and in the split that recall is measured on.

Two pairs are alike when they share one of three traits: the bytes of the ground image, the bytes of the aerial image,
or position and heading (both exactly as the dataset gives them). An aerial image that a dataset itself lists for
several pairs of one location (VIGOR: its train and test pairs share references by protocol) is one reference, no leak.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

BoolArray: TypeAlias = npt.NDArray[np.bool_]
Traits: TypeAlias = Mapping[str, Sequence[Hashable | None]]
"""By name of the trait one value per pair; pairs with equal values are alike, None is alike to nothing."""

TRAITS = ("ground_bytes", "aerial_bytes", "position_and_heading")
_PLACE_COLUMNS = ("latitude_deg", "longitude_deg", "heading_deg")


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """A pair that is alike to another one.

    Attributes:
        trait: One of `TRAITS`.
        row: The pair.
        other: The first pair that it is alike to: of the training split for a leak, else of its own split.
        is_leak: Whether `other` is a training pair and this one is not.
    """

    trait: str
    row: int
    other: int
    is_leak: bool


@dataclass(frozen=True, kw_only=True)
class Leaks:
    """The queries of a split that stand in the training split as well.

    Attributes:
        train_split: What the queries were held against.
        is_leaked: bool [N], the queries that share a trait with a training pair; None if there is nothing to hold them
            against, and then `unknown_because` says why.
        num_by_trait: Number of leaked queries by trait; one query may count in several.
        unknown_because: Why it is not known which queries leak; empty if it is.
    """

    train_split: str
    is_leaked: BoolArray | None
    num_by_trait: Mapping[str, int]
    unknown_because: str = ""

    @property
    def num_leaked(self) -> int | None:
        """Number of leaked queries; None if it is not known."""
        return None if self.is_leaked is None else int(self.is_leaked.sum())


def make_traits(
    *,
    ground: Sequence[Hashable | None],
    aerial: Sequence[Hashable | None],
    location_ids: Sequence[str],
    places: Sequence[tuple[float, float, float | None] | None],
) -> Traits:
    """Return what pairs are compared by, from the hashes of their images and where they were taken.

    Args:
        ground: Hash of each pair's ground image, None where it is unknown.
        aerial: The same of its aerial image.
        location_ids: Identity of each pair's location.
        places: Latitude, longitude and heading in degrees; None where the position is unknown.
    """
    locations: dict[Hashable, set[str]] = defaultdict(set)
    for digest, location_id in zip(aerial, location_ids, strict=True):
        locations[digest].add(location_id)
    told_apart = [digest if len(locations[digest]) > 1 else None for digest in aerial]
    return dict(zip(TRAITS, (ground, told_apart, places), strict=True))


def find_repeats(traits: Traits, splits: Sequence[str], *, train_split: str) -> Iterator[Repeat]:
    """Yield every pair that is alike to a training pair, or to an earlier pair of its own split; one for each trait."""
    for trait, values in traits.items():
        first: dict[tuple[str, Hashable], int] = {}
        for row, value in enumerate(values):
            if value is not None:
                first.setdefault((splits[row], value), row)
        for row, value in enumerate(values):
            if value is None:
                continue
            in_training = first.get((train_split, value))
            if in_training is not None and splits[row] != train_split:
                yield Repeat(trait=trait, row=row, other=in_training, is_leak=True)
            elif (other := first[splits[row], value]) != row:
                yield Repeat(trait=trait, row=row, other=other, is_leak=False)


def find_leaks(pairs: pa.Table, split: str, *, train_split: str) -> Leaks:
    """Hold the queries of a manifest's split against its training split.

    Args:
        pairs: The manifest's table of pairs.
        split: Whose rows are the queries, in the table's order.
        train_split: Whose rows they must not share a trait with.
    """
    splits = pairs["split"].to_pylist()
    reason = ""
    if train_split not in splits:
        reason = f"the manifest has no split {train_split!r} to hold the queries against"
    elif split == train_split:
        reason = f"the queries are the training split {train_split!r} itself"
    if reason:
        return Leaks(train_split=train_split, is_leaked=None, num_by_trait={}, unknown_because=reason)
    is_leaked = {trait: np.zeros(len(splits), dtype=bool) for trait in TRAITS}
    for repeat in find_repeats(_table_traits(pairs), splits, train_split=train_split):
        is_leaked[repeat.trait][repeat.row] = repeat.is_leak
    is_query = np.array([name == split for name in splits])
    return Leaks(
        train_split=train_split,
        is_leaked=np.any(list(is_leaked.values()), axis=0)[is_query],
        num_by_trait={trait: int(rows[is_query].sum()) for trait, rows in is_leaked.items()},
    )


def _table_traits(pairs: pa.Table) -> Traits:
    latitude, longitude, heading = (pairs[name].to_pylist() for name in _PLACE_COLUMNS)
    return make_traits(
        ground=_original_hashes(pairs, "ground"),
        aerial=_original_hashes(pairs, "aerial"),
        location_ids=pairs["location_id"].to_pylist(),
        places=[
            None if place[0] is None or place[1] is None else place
            for place in zip(latitude, longitude, heading, strict=True)
        ],
    )


def _original_hashes(pairs: pa.Table, role: str) -> list[str | None]:
    """Return the hashes of the files that the dataset came in, also where the shards hold images derived from them."""
    hashes: list[str | None] = pc.coalesce(pairs[f"{role}_source_xxh3_128"], pairs[f"{role}_xxh3_128"]).to_pylist()
    return hashes
