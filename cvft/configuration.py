"""The one configuration system: plain data in, frozen dataclasses out, nothing silently ignored.

Every configuration class is a frozen dataclass whose fields are annotated with `bool`, `int`, `float`, `str`,
`Literal`, `X | None`, `tuple[X, ...]`, `tuple[X, Y]`, `X | tuple[...]`, `dict[str, X]`, another such dataclass, or
`Any` for plain data that the class itself looks at.
`parse` refuses unknown keys, wrong types and values that the class's own `__post_init__` rejects, and names each by its
dotted key. It needs the standard library alone, because checkpoints carry configurations and must load where only torch
is installed.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast

from cvft.errors import ConfigError

T = TypeVar("T")


def parse(cls: type[T], data: Mapping[str, Any], *, prefix: str = "") -> T:
    """Build the configuration class `cls` from nested plain data.

    Args:
        cls: A frozen dataclass.
        data: Nested mappings and lists as YAML or JSON give them.
        prefix: Dotted name of `data` within the whole configuration, for messages.

    Raises:
        ConfigError: A key is unknown or missing, a value has the wrong type, or the class refuses it.
    """
    return cast(T, _parse_dataclass(cls, data, name=prefix, root=cls, root_prefix=prefix))


def to_plain(config: Any) -> dict[str, Any]:
    """Return the nested plain data (mappings, lists, scalars) from which `parse` builds `config` again."""
    return cast(dict[str, Any], _plain(config))


def dotted_keys(cls: type[Any], prefix: str = "") -> list[str]:
    """List the dotted names of every value that `cls` can hold, in declaration order."""
    keys: list[str] = []
    for name, annotation in _annotations(cls).items():
        nested = _dataclass_of(annotation)
        dotted = f"{prefix}{name}"
        keys.extend(dotted_keys(nested, f"{dotted}.") if nested else [dotted])
    return keys


def dotted_values(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten the nested plain data of `to_plain` to dotted keys; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping):
            flat.update(dotted_values(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _annotations(cls: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _dataclass_of(annotation: Any) -> type[Any] | None:
    candidates = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return next((item for item in candidates if isinstance(item, type) and dataclasses.is_dataclass(item)), None)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _parse_dataclass(cls: type[Any], data: Any, *, name: str, root: type[Any], root_prefix: str) -> Any:
    if isinstance(data, cls):
        return data
    if not isinstance(data, Mapping):
        raise ConfigError(f"{name or 'configuration'}: expected a mapping of keys, got {data!r}")
    annotations = _annotations(cls)
    for key in data:
        if key not in annotations:
            raise ConfigError(
                f"{_join(name, str(key))}: unknown key; {_suggest(name, str(key), annotations, root, root_prefix)}"
            )
    values = {
        key: _parse_value(annotations[key], value, name=_join(name, key), root=root, root_prefix=root_prefix)
        for key, value in data.items()
    }
    for field in dataclasses.fields(cls):
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.name not in values and not has_default:
            raise ConfigError(f"{_join(name, field.name)}: this key must be set")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(_join(name, str(error))) from None


def _suggest(name: str, key: str, annotations: Mapping[str, Any], root: type[Any], root_prefix: str) -> str:
    near = difflib.get_close_matches(key, list(annotations), n=1, cutoff=0.6)
    if near:
        return f"did you mean {_join(name, near[0])}?"
    # The right word may live in another section: `gamma` typed at the top is train.loss.gamma.
    everywhere = dotted_keys(root, f"{root_prefix}." if root_prefix else "")
    leaf = {dotted.rpartition(".")[2]: dotted for dotted in reversed(everywhere)}
    near = difflib.get_close_matches(key, list(leaf), n=1, cutoff=0.6)
    if near:
        return f"did you mean {leaf[near[0]]}?"
    return f"known here: {', '.join(annotations)}"


def _parse_value(annotation: Any, value: Any, *, name: str, root: type[Any], root_prefix: str) -> Any:
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if annotation is Any:
        return value
    if _is_union(annotation):
        if value is None and type(None) in arguments:
            return None
        inner = _member_for(value, [item for item in arguments if item is not type(None)])
        return _parse_value(inner, value, name=name, root=root, root_prefix=root_prefix)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return _parse_dataclass(annotation, value, name=name, root=root, root_prefix=root_prefix)
    if origin is Literal:
        return _parse_literal(arguments, value, name)
    if origin is tuple:
        return _parse_tuple(arguments, value, name=name, root=root, root_prefix=root_prefix)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name}: expected a mapping of keys, got {value!r}")
        return {
            str(key): _parse_value(arguments[1], item, name=_join(name, str(key)), root=root, root_prefix=root_prefix)
            for key, item in value.items()
        }
    return _parse_scalar(annotation, value, name)


def _member_for(value: Any, members: list[Any]) -> Any:
    """Return the member of a union that a value is meant for: of `X | tuple[...]` the tuple for a list."""
    is_list = isinstance(value, list | tuple)
    return next((item for item in members if (typing.get_origin(item) is tuple) == is_list), members[0])


def _parse_literal(choices: tuple[Any, ...], value: Any, name: str) -> Any:
    if value in choices and type(value) in {type(choice) for choice in choices}:
        return value
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{name}: {value!r} is not one of {', '.join(map(repr, choices))}{hint}")


def _parse_tuple(
    arguments: tuple[Any, ...], value: Any, *, name: str, root: type[Any], root_prefix: str
) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name}: expected a list, got {value!r}")
    kinds = [arguments[0]] * len(value) if len(arguments) == 2 and arguments[1] is Ellipsis else list(arguments)
    if len(kinds) != len(value):
        raise ConfigError(f"{name}: expected {len(kinds)} values, got {len(value)}: {value!r}")
    return tuple(
        _parse_value(kind, item, name=f"{name}[{position}]", root=root, root_prefix=root_prefix)
        for position, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _parse_scalar(kind: Any, value: Any, name: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name}: expected {kind.__name__}, got {value!r} ({type(value).__name__})")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{name}: expected a finite number, got {value!r}")
    return value


def require(condition: bool, message: str) -> None:
    """Refuse a configuration value from a `__post_init__`; `message` starts with the field's own name.

    Raises:
        ConfigError: `condition` does not hold.
    """
    if not condition:
        raise ConfigError(message)
