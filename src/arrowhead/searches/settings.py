"""Checks of searches' settings."""

from typing import Any

from arrowhead.errors import InputsInvalid


def require_flags(settings: Any, *names: str) -> None:
    """Check that these fields of settings are True or False: other values would count as True.

    Raises:
        InputsInvalid: a field is something else.
    """
    for name in names:
        if not isinstance(value := getattr(settings, name), bool):
            raise InputsInvalid(f"got {name}={value!r}, wanted True or False")


def is_number(value: Any) -> bool:
    """Whether the value is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_a(kind: type, value: Any, name: str) -> None:
    """Check that the argument `name` is of a kind.

    Raises:
        InputsInvalid: the argument is something else.
    """
    if not isinstance(value, kind):
        raise InputsInvalid(f"got {name} of type {type(value).__name__}, wanted an arrowhead.{kind.__name__}")
