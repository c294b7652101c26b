"""Fixtures: every pipeline in turn, fresh for each test."""

import os
import re
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


RESEMBLED = (
    r"test_(replay|contracts|stored|feed_forward|search)\.py.*[\[-](pixart_alpha|tiny)[-\]]",
    r"test_families\.py.*unguided-(?!wan22|lumina2|mochi|z_image|aura_flow)",
    r"test_family_shapes\.py.*(unguided|float32|bfloat16-(?!wan22|lumina2|mochi|z_image|aura_flow|qwen))",
    r"test_families\.py::test_searches_compress.*headwise-guided-(?!wan22|lumina2|mochi|z_image|aura_flow|qwen)",
    r"test_stack\.py.*unguided-(?!dit\]|dit-|sd3|flux|z_image|wan22|lumina2)",
    r"test_variants\.py::test_searches_find_plans.*\[(?!StableDiffusion3ControlNetP|FluxKontextP|QwenImageEditP|ZImageControlNetP|WanI)",
    r"test_compile\.py::test_(whole_after|blocks_before)\[sd3|test_compile\.py::test_a_compiled_step",
    r"test_compile\.py.*\[flux|test_a_day\.py.*flux",
    r"test_replay\.py::test_any_wrong_cell.*(pixart|learned)",
    r"test_family_shapes\.py::test_several_images.*(aura|allegro|latte|hunyuan|flux2)",
    r"test_variants\.py::test_searches_find_plans.*budget",
    r"test_headwise\.py.*(pixart_alpha|tiny\b)",
    r"test_schedulers\.py::test_few_steps\[budget",
    r"test_speedup\.py.*(pixart_sigma|qwen|wan)",
    r"test_budget_weights\.py::test_errors_are_weighted.*(flux|dit|pixart)",
    r"test_evaluate_runs\.py::test_killed_and_gone_on",
    r"test_edge\.py::test_search_show_generate_evaluate.*folder",
    r"test_attention_in\.py.*budget|test_describe\.py.*(wan|pixart)",
    r"test_budget_weights\.py.*alone",
    r"test_fused_compiles\.py.*\[80\]",
    r"test_distributed\.py::test_two_processes\[sd3",
    r"test_computed_pairs\.py::test_the_counter_knows.*\[import torch",
    r"test_analyze_figures\.py::test_the_command_and_its_arrays",
    r"test_files_written\.py::test_killed_in_the_middle_of_save",
    r"test_flex\.py::test_without_a_compiler",
    r"test_machines\.py::test_a_bare_machine",
    r"test_public_api\.py::test_no_function_hides",
)
"""Cases that others of the quick set resemble, or that take long: `make test-all` runs them. Patterns of their names."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make them slow tests."""
    for item in items:
        if any(re.search(pattern, item.nodeid) for pattern in RESEMBLED):
            item.add_marker(pytest.mark.slow)


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
