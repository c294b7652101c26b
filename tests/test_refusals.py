"""What is refused or warned of, and that a refusal leaves the pipeline as it was."""

import contextlib
import re
import warnings
from dataclasses import replace

import diffusers.models.attention_processor
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    SanaTransformer2DModel,
    UNet2DModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from pipelines import dit, dit_transformer, pixart_sigma, scheduler, tiny, vae
from replay import Memory, Processor, assert_identical, assert_same, compressed, plan, replay, trace
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.errors import (
    AlreadyApplied,
    ArrowheadError,
    BandCoversAll,
    GuidanceMissing,
    GuidanceNotPlanned,
    InputsInvalid,
    KernelUnavailable,
    NotIntercepted,
    PlanMismatch,
    ProcessorReplaced,
    ShareCfgIgnored,
    UnsupportedPipeline,
)
from arrowhead.tiny.pipeline import TinyDiTPipeline

MIXED = ["FFF", "WXV", "RRW", "CwR", "VYR"]


def test_a_transformer_that_is_called_too_often():
    bench = dit()
    again = []

    def call_again(module, args, kwargs, _output):
        if len(again) < 2:
            again.append(1)
            module(*args, **kwargs)

    with left_as_it_was(bench), ah.applied(bench.pipe, plan(bench, MIXED)):
        hook = bench.pipe.transformer.register_forward_hook(call_again, with_kwargs=True)
        with pytest.raises(PlanMismatch, match="plan is for 5 calls"):
            bench.pipe(**bench.inputs())
        hook.remove()


@pytest.mark.parametrize("images", [1, 2])
def test_a_plan_that_shares_branches_where_there_is_one(either, images):
    """Said twice: by a warning, and by the summary. WA-RS + ASC is then WA-RS, and ASC full."""
    grid = ["FCF", "WYV", "CRR", "VwY", "RvR"]
    wanted = replay(either, grid, either.inputs(images=images, guidance=1.0), guided=False)
    with ah.applied(either.pipe, plan(either, grid)) as run:
        with pytest.warns(ShareCfgIgnored, match="guidance is off.*search again"):
            got = trace(either, either.inputs(images=images, guidance=1.0))
        assert any("guidance is off" in note for note in run.summary().notes)
        assert "guidance is off" in str(run.summary())
        assert_same(got, wanted)
        either.pipe(**either.inputs())
        assert run.summary().notes == ()


def test_a_plan_made_with_guidance_used_without_it(either):
    """Also where it shares nothing."""
    grid = ["FFF", "WXW", "RRR", "wWR", "FWR"]
    with ah.applied(either.pipe, plan(either, grid)) as run:
        with pytest.warns(GuidanceMissing, match=r"guidance is off.*with guidance.*search again without guidance"):
            got = trace(either, either.inputs(guidance=1.0))
        assert any("guidance is off" in note for note in run.summary().notes)
    assert_same(got, replay(either, grid, either.inputs(guidance=1.0), guided=False))


def test_a_plan_made_without_guidance_used_with_it(either):
    the_plan = plan(either, ["FFF", "WXW", "RRR", "wWR", "FWR"], guided=False)
    with ah.applied(either.pipe, the_plan) as run:
        with pytest.warns(GuidanceNotPlanned, match=r"guidance is on.*without guidance.*search again with guidance"):
            got = trace(either, either.inputs())
        assert any("guidance is on" in note for note in run.summary().notes)
    assert_same(got, replay(either, ["FFF", "WXW", "RRR", "wWR", "FWR"], either.inputs()))


def test_apply_twice(either):
    wanted = replay(either, MIXED, either.inputs())
    with left_as_it_was(either), ah.applied(either.pipe, plan(either, MIXED)):
        with pytest.raises(AlreadyApplied, match="remove"):
            ah.apply(either.pipe, plan(either, ["FFF"] * 5))
        assert_same(trace(either, either.inputs()), wanted)


def test_search_on_an_applied_pipeline(either):
    wanted = replay(either, MIXED, either.inputs())
    with left_as_it_was(either), ah.applied(either.pipe, plan(either, MIXED)):
        with pytest.raises(AlreadyApplied, match="remove"):
            ah.search(either.pipe, either.inputs(), progress=False)
        assert_same(trace(either, either.inputs()), wanted)


def test_two_pipelines_of_one_transformer():
    bench = tiny()
    other = replace(bench, pipe=TinyDiTPipeline(**bench.pipe.components))
    other.pipe.set_progress_bar_config(disable=True)
    wanted = replay(bench, MIXED, bench.inputs())
    with left_as_it_was(bench), left_as_it_was(other), ah.applied(bench.pipe, plan(bench, MIXED)):
        with pytest.raises(AlreadyApplied, match="remove"):
            ah.apply(other.pipe, plan(bench, ["FFF"] * 5))
        assert type(other.pipe) is TinyDiTPipeline
        assert_same(trace(bench, bench.inputs()), wanted)


def test_remove_without_apply(either):
    with left_as_it_was(either), pytest.raises(ArrowheadError, match="apply"):
        ah.remove(either.pipe)


def test_applied_takes_off_its_own_plan_only(either):
    other = ["FFF", "RRR", "RRR", "RRR", "RRR"]
    wanted = replay(either, other, either.inputs())
    with left_as_it_was(either):
        with ah.applied(either.pipe, plan(either, MIXED)):
            ah.remove(either.pipe)
            ah.apply(either.pipe, plan(either, other))
        assert_same(trace(either, either.inputs()), wanted)
        ah.remove(either.pipe)
    with left_as_it_was(either), contextlib.suppress(ZeroDivisionError), ah.applied(either.pipe, plan(either, MIXED)):
        either.pipe(**either.inputs())
        _ = 1 / 0


def foreign_plans():
    here = dit()
    grid = MIXED
    other_scheduler = dit()
    other_scheduler.pipe.scheduler = DDIMScheduler()
    other_setting = dit()
    other_setting.pipe.scheduler = scheduler(solver_order=3)
    return {
        "transformer": (plan(pixart_sigma(), grid), "DiTTransformer2DModel.*|.*PixArtTransformer2DModel"),
        "layers": (plan(dit(num_layers=4), [row + "F" for row in grid]), "number of sites: plan 4, pipeline 3"),
        "heads": (
            plan(dit(num_attention_heads=6, attention_head_dim=4), grid),
            "heads of site transformer_blocks.0.*: plan 6, pipeline 3",
        ),
        "width": (plan(dit(attention_head_dim=16), grid), "head_dim of site transformer_blocks.0.*: plan 16, pipeline 8"),
        "scheduler": (plan(other_scheduler, grid), "scheduler: plan DDIMScheduler, pipeline DPMSolverMultistepScheduler"),
        "setting": (plan(other_setting, grid), "solver_order: plan 3, pipeline 2"),
    } | {"same": (plan(here, grid), None)}


@pytest.mark.parametrize("what", ["transformer", "layers", "heads", "width", "scheduler", "setting", "same"])
def test_a_plan_for_something_else(what):
    bench = dit()
    the_plan, difference = foreign_plans()[what]
    with left_as_it_was(bench):
        if difference is None:
            assert_same(compressed(bench, the_plan, bench.inputs()), replay(bench, MIXED, bench.inputs()))
            return
        with pytest.raises(PlanMismatch, match="search again") as caught:
            ah.apply(bench.pipe, the_plan, changes="refuse" if what in ("scheduler", "setting") else "adapt")
        assert re.search(difference, str(caught.value))


def test_a_scheduler_that_is_exchanged_while_a_plan_is_applied():
    bench = dit()
    own = bench.pipe.scheduler
    wanted = replay(bench, MIXED, bench.inputs())
    with left_as_it_was(bench), ah.applied(bench.pipe, plan(bench, MIXED), changes="refuse"):
        bench.pipe.scheduler = DPMSolverMultistepScheduler.from_config(own.config, use_karras_sigmas=True)
        with pytest.raises(PlanMismatch, match="use_karras_sigmas: plan False, pipeline True"):
            bench.pipe(**bench.inputs())
        bench.pipe.scheduler = own
        assert_same(trace(bench, bench.inputs()), wanted)


class SomebodysPipeline(DiffusionPipeline):
    """Nobody knows the order of its branches."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)


class DescendantPipeline(DiTPipeline):
    """A pipeline derived from one that is known."""


def unsupported():
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    sizes = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "caption_channels": 8}
    cross = {"num_cross_attention_heads": 1, "cross_attention_head_dim": 8, "cross_attention_dim": 8}
    sana = SanaTransformer2DModel(in_channels=4, out_channels=4, patch_size=1, **sizes, **cross)
    return {
        "DDPMPipeline": DDPMPipeline(unet, DDPMScheduler()),
        "SanaTransformer2DModel": TinyDiTPipeline(sana, scheduler()),
        "SomebodysPipeline": SomebodysPipeline(dit_transformer(), scheduler()),
    }


@pytest.mark.parametrize("name", ["DDPMPipeline", "SanaTransformer2DModel", "SomebodysPipeline"])
def test_unsupported_pipelines(name):
    pipe, the_plan = unsupported()[name], plan(dit(), MIXED)
    attributes = dict(vars(pipe))
    with pytest.raises(UnsupportedPipeline, match=f"got .*{name}.*wanted .* like .*; docs/families.md"):
        ah.apply(pipe, the_plan)
    with pytest.raises(UnsupportedPipeline, match=f"got .*{name}.*wanted .* like .*; docs/families.md"):
        ah.search(pipe, {"class_labels": [1]}, progress=False)
    assert vars(pipe) == attributes


def test_a_derived_pipeline_is_supported():
    bench = dit()
    bench.pipe = DescendantPipeline(bench.pipe.transformer, vae(1).double(), bench.pipe.scheduler)
    bench.pipe.set_progress_bar_config(disable=True)
    assert_same(compressed(bench, plan(bench, MIXED), bench.inputs()), replay(bench, MIXED, bench.inputs()))


class PassingTransformer(DiTTransformer2DModel):
    """Its signature names nothing."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_a_transformer_whose_signature_names_nothing():
    """It is compressed as any other, or refused in arrowhead's words."""
    bench = dit()
    bench.pipe.register_modules(transformer=dit_transformer(cls=PassingTransformer, out_channels=4).double())
    try:
        got = compressed(bench, plan(bench, MIXED), bench.inputs())
    except ArrowheadError as error:
        assert "wanted" in str(error)  # noqa: PT017  # either will do
    else:
        assert_same(got, replay(bench, MIXED, bench.inputs()))


@pytest.mark.parametrize("layers", [[0, 1, 2], [1]])
def test_a_processor_without_sdpa(either, layers):
    """It shows when the site runs; after that all is well again."""
    for layer in layers:
        either.attentions[layer].processor = AttnProcessor()
    with left_as_it_was(either):
        with ah.applied(either.pipe, plan(either, MIXED)) as run:
            with pytest.raises(NotIntercepted, match=rf"transformer_blocks.{layers[0]}.attn1: AttnProcessor did not call"):
                either.pipe(**either.inputs())
            assert run.cache_bytes == 0
        with pytest.raises(NotIntercepted, match=rf"transformer_blocks.{layers[0]}.attn1: AttnProcessor did not call"):
            ah.search(either.pipe, either.inputs(), strategy="budget", progress=False)


def test_a_processor_that_attends_by_itself(either):
    """It multiplies, and calls no function for attention: refused when the site runs, whatever its cell."""
    either.attentions[1].processor = Processor(1, Memory(either, 2, 5, row="FFF"))
    with left_as_it_was(either):
        with (
            ah.applied(either.pipe, plan(either, MIXED)),
            pytest.raises(NotIntercepted, match=r"blocks.1.attn1: Processor did not"),
        ):
            either.pipe(**either.inputs())
        with pytest.raises(NotIntercepted, match=r"transformer_blocks.1.attn1: Processor did not call"):
            ah.search(either.pipe, either.inputs(), strategy="budget", progress=False)


class CausalProcessor:
    """Each token sees those before it alone."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k, v = (f(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
        return attn.to_out[0](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("grid", [["FFF", "FFw", "FFF", "FFF", "FFF"], ["FFF", "WFF", "FFF", "FFF", "FFF"]])
def test_a_band_where_the_models_attention_is_causal(grid):
    """Reuse and sharing go with it, a band does not."""
    bench = dit()
    for attn in bench.attentions:
        attn.processor = CausalProcessor()
    with left_as_it_was(bench):
        with ah.applied(bench.pipe, plan(bench, grid)) as run:
            with pytest.raises(PlanMismatch, match=r"transformer_blocks.*causal"):
                bench.pipe(**bench.inputs())
            assert run.cache_bytes == 0
        assert_identical(compressed(bench, plan(bench, ["FFF"] * 5), bench.inputs()), trace(bench, bench.inputs()))
        compressed(bench, plan(bench, ["FFF", "RCF", "CRR", "FFC", "RRR"]), bench.inputs())


def test_processors_that_are_replaced_while_a_plan_is_applied(either):
    own = [attn.processor for attn in either.attentions]
    ah.apply(either.pipe, plan(either, MIXED))
    theirs = either.attentions[1].processor = AttnProcessor2_0()
    with pytest.warns(ProcessorReplaced, match="transformer_blocks.1.attn1") as caught:
        ah.remove(either.pipe)
    assert len(caught) == 1
    assert [attn.processor for attn in either.attentions] == [own[0], theirs, own[2]]
    with left_as_it_was(either):
        assert_same(compressed(either, plan(either, MIXED), either.inputs()), replay(either, MIXED, either.inputs()))


@pytest.mark.parametrize("replaced", [[1], [0, 1, 2]])
def test_a_generation_past_replaced_processors_does_not_go_unsaid(either, replaced):
    """An error, a warning or a note, as long as the site is named; and no claim of having saved its FLOPs."""
    run = ah.apply(either.pipe, plan(either, ["FFF", "CCC", "CCC", "CCC", "CCC"]))
    for layer in replaced:
        either.attentions[layer].processor = AttnProcessor2_0()
    try:
        with warnings.catch_warnings(record=True, action="always") as caught:
            either.pipe(**either.inputs())
        said = [str(warning.message) for warning in caught] + list(run.summary().notes)
        assert run.summary().flops.module >= 0.6
    except ArrowheadError as error:
        said = [str(error)]
    finally:
        with warnings.catch_warnings(action="ignore"):
            ah.remove(either.pipe)
    assert any(f"transformer_blocks.{replaced[0]}.attn1" in text for text in said)


@pytest.mark.parametrize("kernel", ["fussed", "", "Chunked"])
def test_a_kernel_that_is_not_there(either, kernel):
    with left_as_it_was(either), pytest.raises(KernelUnavailable, match="wanted one of auto, chunked, flex, fused, reference"):
        ah.apply(either.pipe, plan(either, MIXED), kernel=kernel)


@pytest.mark.parametrize("make", [dit, tiny])
def test_arguments_that_the_pipeline_does_not_take(make):
    bench = make()
    wanted = replay(bench, MIXED, bench.inputs())
    with left_as_it_was(bench), ah.applied(bench.pipe, plan(bench, MIXED)):
        with pytest.raises(InputsInvalid, match="no_such"):
            bench.pipe(**bench.inputs(), no_such=1)
        assert_same(trace(bench, bench.inputs()), wanted)


@contextlib.contextmanager
def taken_off_in_the_end(bench):
    """So that a plan which is left behind does not trouble other tests."""
    try:
        yield
    finally:
        with warnings.catch_warnings(action="ignore"), contextlib.suppress(ArrowheadError):
            ah.remove(bench.pipe)


@pytest.mark.parametrize("how", [ah.apply, lambda *args: ah.applied(*args).__enter__()], ids=["apply", "applied"])
def test_a_warning_of_apply_that_is_an_error_leaves_nothing(either, how):
    wide = plan(either, ["FFF", "www", "FFF", "FFF", "FFF"], near=15)
    with taken_off_in_the_end(either), left_as_it_was(either), warnings.catch_warnings():
        warnings.simplefilter("error", BandCoversAll)
        with pytest.raises(BandCoversAll):
            how(either.pipe, wide)


def test_a_warning_of_a_generation_that_is_an_error_leaves_nothing(either):
    wanted = replay(either, MIXED, either.inputs())
    with left_as_it_was(either), ah.applied(either.pipe, plan(either, MIXED)) as run:
        with warnings.catch_warnings(action="error", category=ShareCfgIgnored), pytest.raises(ShareCfgIgnored):
            either.pipe(**either.inputs(guidance=1.0))
        assert run.cache_bytes == 0
        assert_same(trace(either, either.inputs()), wanted)


def test_a_warning_of_remove_that_is_an_error_still_removes(either):
    own, cls = [attn.processor for attn in either.attentions], type(either.pipe)
    with taken_off_in_the_end(either):
        ah.apply(either.pipe, plan(either, MIXED))
        theirs = either.attentions[1].processor = AttnProcessor2_0()
        with warnings.catch_warnings(action="error"), pytest.raises(ProcessorReplaced):
            ah.remove(either.pipe)
        assert [attn.processor for attn in either.attentions] == [own[0], theirs, own[2]]
        assert type(either.pipe) is cls
        assert diffusers.models.attention_processor.F is torch.nn.functional
