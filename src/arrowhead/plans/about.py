"""The schema of provenance: the field `about` of plans, tables and analyses."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic

from arrowhead.errors import ArrowheadError
from arrowhead.plans import limits


class _AboutModel(pydantic.BaseModel, extra="allow", strict=True):
    """The entries that arrowhead writes and reads. All are optional, and others may stand beside them."""

    pipeline: str = ""
    model: str = ""
    inputs: dict[str, Any] = {}
    seeds: list[int] = []
    device: str = ""
    dtype: str = ""
    created: str = ""
    versions: dict[str, str] = {}
    search: dict[str, Any] = {}
    analysis: dict[str, Any] = {}
    derived: list[dict[str, str]] = []


def require_about(about: Mapping[str, Any]) -> dict[str, Any]:
    """Check that the known entries of a provenance have the types that they are written with; gives the provenance.

    Raises:
        ValueError: one has another type.
    """
    try:
        _AboutModel.model_validate(dict(about))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}") from error
    return dict(about)


def about_in_file(about: Mapping[str, Any], raised: type[ArrowheadError]) -> dict[str, Any]:
    """A provenance as JSON holds it, with other values as their text. Asked for before anything is written.

    Raises:
        raised: `load` would not read it.
    """
    try:
        return json.loads(json.dumps(require_about(about), default=str, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise raised(
            f"got an `about` that no file can have ({limits.shortened(error)}); wanted what a search writes there: text, "
            "finite numbers, lists and dictionaries; correct this entry, or leave it out"
        ) from error


About = Annotated[dict[str, Any], pydantic.AfterValidator(require_about)]
"""The field of a pydantic model."""
