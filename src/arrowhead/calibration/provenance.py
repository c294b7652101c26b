"""How a result was made, for people to read: the field `about` of plans, tables and analyses."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from arrowhead.calibration.driver import Driver
from arrowhead.plans.target import to_json_value
from arrowhead.versions import versions


def provenance(driver: Driver, settings: Mapping[str, Any], what: str = "search") -> dict[str, Any]:
    """What ran, on which inputs, with which settings and versions, as JSON holds it; `what` names the settings' entry."""
    return {
        **driver.described(),
        what: {name: to_json_value(value) for name, value in settings.items()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
