"""Fixtures: every pipeline in turn, fresh for each test."""

import os
import tempfile
from typing import Any

import pytest
import torch

os.environ["ARROWHEAD_CACHE"] = tempfile.mkdtemp()  # no test reads or writes the user's
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, as diffusers does

from diffusers.utils import logging
from pipelines import BENCHES, Bench

logging.set_verbosity_error()  # casting these small models to float64 is meant


@pytest.fixture(params=BENCHES)
def bench(request: Any) -> Bench:
    """Each pipeline, in float64, so that a comparison can be tight."""
    return BENCHES[request.param]()


@pytest.fixture(params=BENCHES)
def bench32(request: Any) -> Bench:
    """Each pipeline, in float32."""
    return BENCHES[request.param](torch.float32)


@pytest.fixture(params=["dit", "pixart_sigma"])
def either(request: Any) -> Bench:
    """One pipeline of each order of the CFG branches, where the others would tell nothing more."""
    return BENCHES[request.param]()
