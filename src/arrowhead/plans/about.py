"""The schema of provenance: the field `about` of plans, tables and analyses."""

from collections.abc import Mapping
from typing import Annotated, Any

import pydantic


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
    _AboutModel.model_validate(dict(about))
    return dict(about)


About = Annotated[dict[str, Any], pydantic.AfterValidator(require_about)]
"""The field of a pydantic model."""
