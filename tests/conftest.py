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
    r"test_variants\.py::test_plans_are_what_a_replay_gives.*-unguided",
    r"test_schedulers\.py::test_any_sampler.*(-[24]\]|\[KDPM2Disc)",
    r"test_schedulers\.py::test_samplers\[(2|5-flux)",
    r"test_state\.py::test_guidance_that_ends_early\[((ASC|AST|band)-.-flux|.*-2-)",
    r"test_contracts\.py::test_an_interrupted.*\[(dit.*KeyboardI|pixart_sigma.*Stop)",
    r"test_budget_table\.py::test_each_kind.*\[(alone-(flux|pixart_sigma|sd3)|guided-(dit|sd3))",
    r"test_budget_table\.py::test_scores_in_int8.*(True-alone-(flux|pixart)|True-guided-(dit|pix|sd3)|False-alone-(dit|fl|sd3))",
    r"test_budget_table\.py::test_scores_in_int8.*False-guided-(dit|flux|pixart)",
    r"test_headwise\.py::test_faults\[(tiny_mmdit|sd35)",
    r"test_replay\.py::test_grid\[dit_learned",
    r"test_speedup\.py::test_a_profile_at_other_steps\[(12-24-0|20-28|24-12|24-8-1)",
    r"test_own\.py::test_searches_compress.*(budget-two|budget-with\b|\[without.*(two|opensora|without ))",
    r"test_own\.py::test_the_example_runs",
    r"test_fused\.py::test_(residuals_of_)?every_head_dim.*(text.*-(80|96)|before-64|after-128)",
    r"test_between\.py::test_two_pipelines_share.*(flux|own)",
    r"test_caches\.py::test_eight_bits.*(flux|own)",
    r"test_offload\.py::test_the_same_plan_is_found.*(flux|own)",
    r"test_two_transformers\.py::test_searches_read_nothing_across\[budget",
    r"test_contracts\.py::test_only_what_is_read_later.*(learned|sigma)",
    r"test_search\.py::test_greedy_is_algorithm_1.*(learned|signed)",
    r"test_budget_weights\.py::test_errors_are_weighted|test_resample\.py::test_a_derived_plan_is_written",
    r"test_budget_checkpoint\.py.*(flux|pixart)",
    r"test_stack_uses\.py::test_compiled\[(blocks-(flux|wan|sd3|z)|whole-(dit|flux|z_image|sd3))",
    r"test_fused\.py::test_descriptors.*(80|96|tma-64|specialised-72|specialised-128)",
    r"test_benchmarks_pipelines\.py::test_plans_leave.*(-[01]\]|2K|SD3)",
    r"test_benchmarks_pipelines\.py::test_models_are_the_public_ones.*(2K|FLUX-1024)",
    r"test_soak_mixed\.py::test_nothing_grows\[blocks",
    r"test_site_order\.py::test_a_search_finds.*(sd35-|flux-trials|dit-budget)",
    r"combinations/test_weights\.py::test_searches.*(flux|own)",
    r"test_corrupted\.py::test_reading_opens_one.*(table|analysis)",
    r"test_budget_weights\.py::test_a_search_without_gradients.*(pixart|flux|sd3)",
    r"test_analyze_figures\.py.*(sd3-False|constant|peaked)",
    r"test_profile_memory\.py::test_what_is_held.*\[(2-(dit|flux|wan-|z_image)|1-wan-)",
    r"test_two_transformers\.py::test_pipelines_that_call.*alone-|test_two_tr.*read_nothing_across\[(by heads|no grad|speedup)",
    r"test_compile\.py.*\[(own-compile_whole|sd3-compile_blocks)|test_compile\.py::test_(autocast|no_gradients)\[eager",
    r"test_compile\.py::test_(hidden_by_compile|blocks_after|whole_before|counters)\[own",
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
