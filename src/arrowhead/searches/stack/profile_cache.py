"""The folder in which profiles are kept, so that another process need not watch a generation again."""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arrowhead.models.model import Model, target_of
from arrowhead.models.weights import fingerprint
from arrowhead.plans.target import to_json_value

ASKED = ("num_inference_steps", "timesteps", "sigmas", "height", "width", "num_frames", "strength")
"""The arguments of a pipeline's call that a profile depends on, besides guidance."""


def cache_folder() -> Path:
    """`ARROWHEAD_CACHE`, else the platform's folder for caches.

    >>> cache_folder().name
    'arrowhead'
    """
    if own := os.environ.get("ARROWHEAD_CACHE"):
        return Path(own)
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/arrowhead"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "arrowhead"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "arrowhead"


def cached_path(model: Model, call: Mapping[str, Any]) -> Path | None:
    """The file of the profile for such a call of a model; None where the model's weights cannot be told from others."""
    weights = fingerprint(model.transformers)
    if weights is None:
        return None
    facts = {
        "target": {**target_of(model).as_json(), "levels": None, "weights": weights},
        "guided": model.branches(call).guided,
        "call": {name: to_json_value(call[name]) for name in ASKED if name in call},
    }
    name = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return cache_folder() / "profiles" / f"{name}.safetensors"
