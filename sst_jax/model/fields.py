"""Checks of the fields of frozen config dataclasses, whose errors name the field, and how the fields are written."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from sst_jax.errors import InputError

Config = TypeVar("Config")


def require(condition: bool, message: str) -> None:
    """Raise InputError with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


def check_one_of(owner: str, field: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise InputError, naming owner.field, unless the value is allowed.

    Args:
      owner: the section that the field belongs to, such as "stream".
      field: its name.
      value: of the field.
      allowed: all that it may be.
    """
    require(value in allowed, f"{owner}.{field}={value!r} is not one of {', '.join(map(repr, allowed))}")


def is_finite(value: object) -> bool:
    """Return whether the value is a number that a float can hold."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # an int may be beyond every float


def check_numbers(owner: str, config: object, *fields: str, positive: bool = False) -> None:
    """Raise InputError naming the first of a config's fields that is no finite number.

    Args:
      owner: the section that the fields belong to, such as "stream".
      config: a config dataclass.
      fields: names of the fields to check.
      positive: whether a number of 0 or below is refused too.
    """
    for field in fields:
        value = getattr(config, field)
        require(is_finite(value), f"{owner}.{field}={value!r} must be a finite number")
        require(not positive or value > 0, f"{owner}.{field}={value!r} must be positive")


def as_tuple(owner: str, config: object, field: str) -> None:
    """Turn a field of a frozen config from a list into a tuple; raise InputError where it is neither."""
    value = getattr(config, field)
    require(isinstance(value, list | tuple), f"{owner}.{field}={value!r} must be a list")
    object.__setattr__(config, field, tuple(value))


def from_mapping(cls: type[Config], mapping: Mapping[str, Any]) -> Config:
    """Return a config of type `cls` from a mapping of its fields; lists become tuples.

    Raises: InputError naming an unknown or missing key, or a bad value.
    """
    require(isinstance(mapping, Mapping), f"{cls.__name__} is read from a mapping of its fields, not {mapping!r}")
    fields = {field.name: field for field in fields_of(cls)}
    former = {written_name(field): name for name, field in fields.items()}
    mapping = {former.get(key, key): value for key, value in mapping.items()}
    known = set(fields)
    unknown = sorted(set(mapping) - known)
    require(not unknown, f"{cls.__name__} has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    missing = sorted(required - set(mapping))
    require(not missing, f"{cls.__name__} lacks the field {', '.join(missing)}")
    return cls(**{key: as_tuples(value) for key, value in mapping.items()})


def as_tuples(value: object) -> Any:
    """Return a value with its lists, and those in them, as tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, (list, tuple)) else value


def fields_of(config: object) -> tuple[dataclasses.Field, ...]:
    """Return the fields of a config dataclass or its type."""
    require(dataclasses.is_dataclass(config), f"{config!r} is no config")
    return dataclasses.fields(cast(Any, config))


def written_name(field: dataclasses.Field) -> str:
    """Return the name of a field in files: its own, or the one that version 0.1.0 wrote (metadata "written")."""
    return field.metadata.get("written", field.name)


def written_fields(config: object) -> dict[str, Any]:
    """Return the fields of a config dataclass that are written down.

    One that version 0.1.0 did not have is left out while it holds its default, so that what 0.1.0 recorded compares
    equal, and 0.1.0 reads what does not need the field.
    """
    return {
        written_name(field): getattr(config, field.name)
        for field in fields_of(config)
        if field.repr and ("since" not in field.metadata or getattr(config, field.name) != field.default)
    }


def canonical_text(config: object) -> str:
    """Return the text of a config that digests are made of: its `repr` as version 0.1.0 had it."""
    if not dataclasses.is_dataclass(config):
        return repr(config)
    fields = (f"{name}={canonical_text(value)}" for name, value in written_fields(config).items())
    return f"{type(config).__qualname__}({', '.join(fields)})"
