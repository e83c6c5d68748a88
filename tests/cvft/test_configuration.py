from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvft.config import LossConfig, ModelConfig, OptimizerConfig, PreprocessConfig
from cvft.configuration import dotted_keys, dotted_values, parse, require, to_plain
from cvft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    gamma: float = 10.0
    kind: Literal["hard", "soft"] = "hard"
    sizes: tuple[int, int] = (1, 2)

    def __post_init__(self) -> None:
        require(self.gamma > 0, f"gamma: {self.gamma} must be positive")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    distance_m: float | None = None
    inner: Inner = field(default_factory=Inner)
    weights: dict[str, float] = field(default_factory=dict)


@pytest.mark.parametrize("cls", [ModelConfig, PreprocessConfig, LossConfig, OptimizerConfig])
def test_every_default_configuration_survives_the_way_to_plain_data_and_back(cls):
    config = cls()
    assert parse(cls, to_plain(config)) == config


@given(
    name=st.text(),
    gamma=st.floats(min_value=1e-6, max_value=1e6),
    distance_m=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    weights=st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)),
)
def test_any_value_survives_the_way_to_plain_data_and_back(name, gamma, distance_m, weights):
    config = Outer(name=name, distance_m=distance_m, inner=Inner(gamma=gamma), weights=weights)
    assert parse(Outer, to_plain(config)) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "a", "inner": {"gama": 1.0}}, "inner.gama: unknown key; did you mean inner.gamma?"),
        ({"name": "a", "gamma": 1.0}, "gamma: unknown key; did you mean inner.gamma?"),
        ({"name": "a", "zzz": 1.0}, "zzz: unknown key; known here: name, distance_m, inner, weights"),
        ({}, "name: this key must be set"),
        ({"name": 3}, "name: expected str, got 3 (int)"),
        ({"name": "a", "inner": {"gamma": "ten"}}, "inner.gamma: expected float, got 'ten' (str)"),
        ({"name": "a", "inner": {"gamma": True}}, "inner.gamma: expected float, got True (bool)"),
        ({"name": "a", "inner": {"gamma": float("nan")}}, "inner.gamma: expected a finite number, got nan"),
        ({"name": "a", "inner": {"gamma": -1.0}}, "inner.gamma: -1.0 must be positive"),
        (
            {"name": "a", "inner": {"kind": "sofd"}},
            "inner.kind: 'sofd' is not one of 'hard', 'soft'; did you mean 'soft'?",
        ),
        ({"name": "a", "inner": {"sizes": [1]}}, "inner.sizes: expected 2 values, got 1: [1]"),
        ({"name": "a", "inner": {"sizes": [1, 2.5]}}, "inner.sizes[1]: expected int, got 2.5 (float)"),
        ({"name": "a", "inner": 3}, "inner: expected a mapping of keys, got 3"),
        ({"name": "a", "weights": {"x": "y"}}, "weights.x: expected float, got 'y' (str)"),
    ],
)
def test_a_refused_value_is_named_by_its_dotted_key(data, message):
    with pytest.raises(ConfigError) as caught:
        parse(Outer, data)
    assert str(caught.value) == message


def test_a_whole_number_is_taken_for_a_float_but_not_the_other_way_round():
    assert parse(Outer, {"name": "a", "distance_m": 25}).distance_m == 25.0
    with pytest.raises(ConfigError, match=r"sizes\[0\]: expected int"):
        parse(Outer, {"name": "a", "inner": {"sizes": [1.0, 2]}})


def test_dotted_keys_name_every_leaf():
    assert dotted_keys(Outer) == ["name", "distance_m", "inner.gamma", "inner.kind", "inner.sizes", "weights"]


def test_dotted_values_join_keys_and_keep_lists():
    assert dotted_values({"a": {"b": {"c": 1}, "d": [1, {"x": 2}]}, "e": None}) == {
        "a.b.c": 1,
        "a.d": [1, {"x": 2}],
        "e": None,
    }
