"""What a search goes through: keys of the configuration with their ranges, choices and conditions, checked beforehand.

    space:
      train.loss.kind: {type: choice, values: [soft_margin_triplet, info_nce]}
      train.loss.gamma: {type: float, low: 3, high: 30, log: true, when: {train.loss.kind: soft_margin_triplet}}

A key that there is not, an end of a range that the configuration refuses and a condition that can never hold are
refused before the first trial. A combination that is refused although each of its values is possible alone is no trial:
another one is drawn.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

from cvft.configuration import dotted_keys, dotted_values, parse, require, to_plain
from cvft.errors import ConfigError
from jobs.config import ExperimentConfig
from jobs.run_file import FREE_KEYS
from jobs.search.parameter import ParameterConfig, same
from pipeline.search import Parameter, Value

Values = dict[str, Value]
_TRIES = 200  # combinations tried to find one in which a value is possible
_NOT_SEARCHED = {
    "name": "it names the run",
    "train.seed": "a search over seeds finds luck; final.seeds measures how much there is",
    "train.num_epochs": "trials are compared epoch by epoch; give it as an override",
    "train.evaluate_every": "trials are compared epoch by epoch",
    **dict.fromkeys((*FREE_KEYS, "tracking.experiment"), "it does not change what is trained"),
}


class Space:
    """The searched keys over a base configuration, in an order in which conditions come before what hangs on them."""

    def __init__(self, parameters: Mapping[str, ParameterConfig], base: ExperimentConfig) -> None:
        """Check all of it.

        Raises:
            ConfigError: A key, a value or a condition cannot be used; the message begins with `space.` and its key.
        """
        require(len(parameters) >= 1, "space: name at least one key to search")
        self._base = to_plain(base)
        for key in parameters:
            _check_key(key)
        self.parameters = _in_order(parameters)
        self.defaults: Values = {key: dotted_values(self._base).get(key) for key in self.parameters}
        for key, parameter in self.parameters.items():
            for name, value in parameter.ends().items():
                self._check_possible(key, name, value)

    def is_active(self, key: str, values: Mapping[str, Value]) -> bool:
        """Tell whether a key's condition holds for the values of the keys before it."""
        when = self.parameters[key].when or {}
        return all(
            other in values and any(same(values[other], wanted) for wanted in _wanted(condition))
            for other, condition in when.items()
        )

    def config(self, values: Mapping[str, Value]) -> ExperimentConfig:
        """Return the base with these values.

        Raises:
            ConfigError: They cannot be used together.
        """
        return parse(ExperimentConfig, with_values(self._base, values))

    def allows(self, values: Mapping[str, Value]) -> bool:
        """Tell whether the configuration takes these values together."""
        try:
            self.config(values)
        except ConfigError:
            return False
        return True

    def draw(self, generator: np.random.Generator, fixed: Mapping[str, Value] | None = None) -> Values:
        """Draw the value of every key that is active, all but those that are given."""
        values: Values = {}
        for key, parameter in self.parameters.items():
            if self.is_active(key, values):
                drawn = parameter.draw(generator)  # of a given one too, so that it does not shift the others
                values[key] = fixed[key] if fixed and key in fixed else drawn
        return values

    def grid(self) -> list[Values]:
        """Return the product of the values of all keys, a key only where it is active.

        Raises:
            ConfigError: A range of floats does not say which of its values a grid takes.
        """
        points: list[Values] = [{}]
        for key, parameter in self.parameters.items():
            try:
                choices = parameter.grid()
            except ConfigError as error:
                raise ConfigError(f"space.{key}.{error}") from None
            points = [
                more
                for values in points
                for more in ([{**values, key: value} for value in choices] if self.is_active(key, values) else [values])
            ]
        return points

    def report(self) -> tuple[Parameter, ...]:
        """Describe the keys for the search's report."""
        return tuple(
            Parameter(
                name=key,
                kind=parameter.type,
                low=parameter.low,
                high=parameter.high,
                is_log=parameter.log,
                choices=tuple(parameter.values or ()),
                default=self.defaults[key],
            )
            for key, parameter in self.parameters.items()
        )

    def _check_possible(self, key: str, name: str, value: Value) -> None:
        """Try a value: with all else as the base has it, and else in combinations with the other keys."""
        needed = {**self._needed(key), key: value}
        try:
            self.config(needed)
        except ConfigError as error:
            generator = np.random.default_rng(0)
            tries = (self.draw(generator, needed) for _ in range(_TRIES))
            if not any(key in values and self.allows(values) for values in tries):
                raise ConfigError(f"space.{key}.{name}: {value!r} cannot be used: {error}") from None

    def _needed(self, key: str) -> Values:
        """Return values of other keys with which this one is active."""
        values: Values = {}
        for other, condition in (self.parameters[key].when or {}).items():
            values |= {**self._needed(other), other: _wanted(condition)[0]}
        return values


def with_values(plain: Mapping[str, Any], values: Mapping[str, Value]) -> dict[str, Any]:
    """Return nested plain data with dotted keys set anew."""
    result = dict(plain)
    for key, value in values.items():
        place = result
        *sections, leaf = key.split(".")
        for section in sections:
            place[section] = dict(place[section])
            place = place[section]
        place[leaf] = value
    return result


def _check_key(key: str) -> None:
    known = dotted_keys(ExperimentConfig)
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        leaf = key.rpartition(".")[2]
        near = near or [other for other in known if other.rpartition(".")[2] == leaf]
        hint = f"did you mean {near[0]}?" if near else "keys are those of a configuration, such as train.loss.gamma"
        raise ConfigError(f"space.{key}: unknown key; {hint}")
    if key in _NOT_SEARCHED:
        raise ConfigError(f"space.{key}: this key is not searched: {_NOT_SEARCHED[key]}")


def _in_order(parameters: Mapping[str, ParameterConfig]) -> dict[str, ParameterConfig]:
    """Sort the keys so that each comes after those that its condition names."""
    for key, parameter in parameters.items():
        for other, condition in (parameter.when or {}).items():
            _check_condition(f"space.{key}.when.{other}", other, condition, parameters)
    ordered: dict[str, ParameterConfig] = {}
    while len(ordered) < len(parameters):
        ready = [key for key in parameters if key not in ordered and set(parameters[key].when or ()) <= ordered.keys()]
        if not ready:
            circle = [key for key in parameters if key not in ordered]
            raise ConfigError(f"space.{circle[0]}.when: the conditions of {', '.join(circle)} run in a circle")
        ordered[ready[0]] = parameters[ready[0]]
    return ordered


def _check_condition(where: str, other: str, condition: Any, parameters: Mapping[str, ParameterConfig]) -> None:
    if other not in parameters:
        raise ConfigError(f"{where}: {other} is not searched; a condition names a key of the space")
    if not _wanted(condition):
        raise ConfigError(f"{where}: an empty list never holds")
    for value in _wanted(condition):
        if not parameters[other].can_take(value):
            raise ConfigError(f"{where}: {other} never takes the value {value!r}")


def _wanted(condition: Any) -> list[Any]:
    return list(condition) if isinstance(condition, list | tuple) else [condition]


def explore(space: Space, values: Mapping[str, Value], generator: np.random.Generator, *, resample: float) -> Values:
    """Return a neighbour of `values`, as population-based training mutates them (Jaderberg et al. 2017, section 3).

    Each number is multiplied by 0.8 or 1.2, each choice moves to a neighbour in the list; with probability `resample` a
    value is drawn anew. Values stay inside their ranges, and combinations that are refused are tried again.
    """
    for _ in range(_TRIES):
        changed: Values = {}
        for key, value in values.items():
            parameter = space.parameters[key]
            is_drawn = bool(generator.uniform() < resample)
            changed[key] = parameter.draw(generator) if is_drawn else parameter.mutate(value, generator)
        fresh = space.draw(generator, changed)
        if space.allows(fresh):
            return fresh
    return dict(values)
