"""One axis for each parameter of a search: where a value stands on it, from 0 to 1, and what its marks are called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from matplotlib.ticker import MaxNLocator

from pipeline.search import Parameter, SearchTrial, Value

_MIN_GAP = 0.09  # of the axis between two marks, so that their words do not touch


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A mark: its place from 0 to 1 and its words."""

    place: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A range or a list of values.

    Attributes:
        name: The parameter's dotted key.
        low: Lower end of a range.
        high: Upper end of a range.
        is_log: Whether the range is logarithmic.
        is_whole: Whether its values are whole numbers.
        is_share: Whether its values are fractions that are written in per cent.
        categories: The values of a choice; empty for a range.
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    is_log: bool = False
    is_whole: bool = False
    is_share: bool = False
    categories: tuple[Value, ...] = ()

    def place(self, value: Value) -> float | None:
        """Return where a value stands; None if it has no place: no number, or 0 on a logarithmic axis."""
        if self.categories:
            known = [_identity(category) for category in self.categories]
            wanted = _identity(value)
            return (known.index(wanted) + 0.5) / len(known) if wanted in known else None
        if not _is_number(value) or (self.is_log and value <= 0):
            return None
        low, high, at = (self._scaled(end) for end in (self.low, self.high, value))
        return (at - low) / (high - low) if high > low else 0.5

    @property
    def ticks(self) -> list[Tick]:
        """The marks, from low to high; the ends of a range are always among them."""
        if self.categories:
            return [
                Tick(place=(index + 0.5) / len(self.categories), text=format_value(value))
                for index, value in enumerate(self.categories)
            ]
        values = [self.low, self.high] if self.high > self.low else [self.low]
        for value in self._between():
            places = [self._known_place(other) for other in values]
            if all(abs(self._known_place(value) - place) >= _MIN_GAP for place in places):
                values.append(value)
        write = "{:.1%}".format if self.is_share else format_value
        return [Tick(place=self._known_place(value), text=write(value)) for value in sorted(values)]

    def _between(self) -> list[float]:
        """Round numbers within the range, the roundest first."""
        if not self.is_log:
            found = MaxNLocator(5, integer=self.is_whole).tick_values(self.low, self.high)
            return [float(value) for value in found if self.low < value < self.high]
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        numbers = [factor * 10.0**exponent for factor in (1, 3) for exponent in exponents]
        return [value for value in numbers if self.low < value < self.high]

    def _known_place(self, value: float) -> float:
        place = self.place(value)
        assert place is not None
        return place

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.is_log else float(value)


def axis_of(parameter: Parameter, trials: Sequence[SearchTrial]) -> Axis:
    """Return a parameter's axis, wide enough for the default and for every trial's value.

    Population-based training leaves the range that it began with, and a default may lie outside what was searched.
    """
    values = [parameter.default, *(trial.values[parameter.name] for trial in trials if parameter.name in trial.values)]
    if parameter.kind == "choice":
        if parameter.default is None:
            del values[0]  # a choice that is not made in the base configuration is no category
        categories = {_identity(value): value for value in [*parameter.choices, *values]}
        return Axis(name=parameter.name, categories=tuple(categories.values()))
    numbers = [float(value) for value in [parameter.low, parameter.high, *values] if _is_number(value)]
    if parameter.is_log:
        numbers = [number for number in numbers if number > 0]
    return Axis(
        name=parameter.name,
        low=min(numbers, default=0.0),
        high=max(numbers, default=1.0),
        is_log=parameter.is_log and bool(numbers),
        is_whole=parameter.kind == "int",
    )


def format_value(value: Value) -> str:
    """Write a value as a configuration file would, numbers with four digits."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short_name(name: str, names: Sequence[str]) -> str:
    """Return the end of a dotted key that tells it from the others: `gamma` for `train.loss.gamma`."""
    parts = name.split(".")
    others = [other.split(".") for other in names if other != name]
    for length in range(1, len(parts)):
        if all(other[-length:] != parts[-length:] for other in others):
            return ".".join(parts[-length:])
    return name


def _is_number(value: Value) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _identity(value: Value) -> tuple[bool, Value]:
    return isinstance(value, bool), value  # True == 1 in Python, and both may be choices
