"""One searched key: its range or its choices, and the condition under which it is searched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cvft.configuration import require
from cvft.errors import ConfigError
from pipeline.search import Value


@dataclass(frozen=True, kw_only=True)
class ParameterConfig:
    """One searched key.

    Attributes:
        type: A range of `float` or `int`, or a `choice` of values.
        low: Lower end of a range, included.
        high: Upper end of a range, included.
        log: Draw on a logarithmic scale.
        step: Only `low`, `low + step`, ... up to `high`.
        num: A grid takes so many values, evenly spaced from `low` to `high`.
        values: The values of a choice.
        when: Searched only where these other searched keys have this value, or one of these; otherwise it is left as
            the base has it.
    """

    type: Literal["float", "int", "choice"]
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    num: int | None = None
    values: Any = None
    when: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.type == "choice":
            self._check_choice()
        else:
            self._check_range()

    def _check_choice(self) -> None:
        for name in ("low", "high", "step", "num"):
            require(getattr(self, name) is None, f"{name}: a choice has values and no range")
        require(not self.log, "log: a choice has values and no range")
        require(isinstance(self.values, list | tuple) and len(self.values) > 0, "values: a choice needs a list of them")
        for number, value in enumerate(self.values):
            is_scalar = value is None or isinstance(value, bool | int | float | str)
            require(is_scalar, f"values[{number}]: {value!r} is not a single value; lists cannot be searched")
            is_new = not any(same(value, other) for other in self.values[:number])
            require(is_new, f"values[{number}]: {value!r} is there twice")

    def _check_range(self) -> None:
        require(self.values is None, f"values: they are of type choice, this is {self.type}")
        low, high = self.low, self.high
        if low is None or high is None:
            raise ConfigError(f"{'low' if low is None else 'high'}: a range needs low and high")
        require(low < high, f"high: {high} must be more than low={low}")
        if self.type == "int":
            for name in ("low", "high", "step"):
                value = getattr(self, name)
                require(value is None or float(value).is_integer(), f"{name}: {value} is no whole number (type int)")
        require(not self.log or low > 0, f"low: {low} must be positive on a logarithmic scale")
        require(self.step is None or self.step > 0, f"step: {self.step} must be positive")
        require(self.step is None or not self.log, "step: a logarithmic scale has none; a grid takes num values of it")
        require(self.step is None or self.num is None, "num: give either step or num")
        require(self.num is None or self.num >= 2, f"num: {self.num} must be at least 2, the ends of the range")

    @property
    def range(self) -> tuple[float, float]:
        """The ends of a range."""
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high

    def cast(self, number: float) -> Value:
        """Return a number of the range as what the configuration takes, inside the range."""
        low, high = self.range
        inside = min(max(number, low), high)
        return round(inside) if self.type == "int" else float(inside)

    def ends(self) -> dict[str, Value]:
        """Return what is tried before the search: by its name in the specification, the ends or all values."""
        if self.type == "choice":
            return {f"values[{number}]": value for number, value in enumerate(self.values)}
        return {name: self.cast(end) for name, end in zip(("low", "high"), self.range, strict=True)}

    def grid(self) -> list[Value]:
        """Return the values that a grid takes.

        Raises:
            ConfigError: A range of floats without `step` and `num`.
        """
        if self.type == "choice":
            return list(self.values)
        low, high = self.range
        if self.num is not None:
            spaced = np.geomspace if self.log else np.linspace
            points = spaced(low, high, self.num).tolist()
        elif self.step is not None or (self.type == "int" and not self.log):
            step = self.step or 1
            points = [low + step * k for k in range(int((high - low) / step + 1e-9) + 1)]
        else:
            raise ConfigError("num: a grid needs the number of values of this range, or a step")
        return list(dict.fromkeys(self.cast(point) for point in points))

    def can_take(self, value: Any) -> bool:
        """Tell whether a condition may wait for this value; a float is never drawn exactly."""
        if self.type == "choice":
            return any(same(value, choice) for choice in self.values)
        if self.type == "float" or isinstance(value, bool) or not isinstance(value, int):
            return False
        low, high = self.range
        return low <= value <= high and (value - low) % (self.step or 1) == 0

    def draw(self, generator: np.random.Generator) -> Value:
        """Draw a value."""
        if self.type == "choice":
            value: Value = self.values[int(generator.integers(len(self.values)))]
            return value
        low, high = self.range
        if self.step is not None:
            return self.cast(low + self.step * int(generator.integers(int((high - low) / self.step + 1e-9) + 1)))
        if self.log:
            return self.cast(float(np.exp(generator.uniform(np.log(low), np.log(high)))))
        if self.type == "int":
            return int(generator.integers(int(low), int(high) + 1))
        return self.cast(float(generator.uniform(low, high)))

    def mutate(self, value: Value, generator: np.random.Generator) -> Value:
        """Return a value beside this one: a number times 0.8 or 1.2, the choice before or after it."""
        up = bool(generator.integers(2))
        if self.type == "choice":
            place = next(number for number, choice in enumerate(self.values) if same(choice, value))
            neighbour: Value = self.values[min(max(place + (1 if up else -1), 0), len(self.values) - 1)]
            return neighbour
        assert isinstance(value, int | float)
        return self.cast(value * (1.2 if up else 0.8))


def same(one: Any, other: Any) -> bool:
    """Tell whether two values are one: True is not 1 here."""
    return type(one) is type(other) and bool(one == other)
