"""What settings of searches have to be."""

from typing import Any

from arrowhead.errors import InputsInvalid


def require_flags(settings: Any, *names: str) -> None:
    """Raises InputsInvalid for a field of settings that is neither True nor False: words would pass for True."""
    for name in names:
        if not isinstance(value := getattr(settings, name), bool):
            raise InputsInvalid(f"got {name}={value!r}, wanted True or False")


def is_number(value: Any) -> bool:
    """Whether it is an int or a float, and no flag."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_a(kind: type, value: Any, name: str) -> None:
    """Raises InputsInvalid for an argument that is something else."""
    if not isinstance(value, kind):
        raise InputsInvalid(f"got {name} of type {type(value).__name__}, wanted an arrowhead.{kind.__name__}")
