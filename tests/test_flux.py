"""FLUX.1: text before the image, rotary positions, two kinds of blocks, and attention through diffusers' dispatcher."""

import random
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from independent import dense_mask
from pipelines import Bench, randomise, vae
from replay import assert_identical, assert_same, distance, processors, trace
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import AST, FULL, Arrow, Attend, Cached, Full, wa_rs
from arrowhead.plans.layout import Tokens
from arrowhead.searches.headwise import Headwise

STEPS, TEXT, VISUAL, HEADS, DIM = 5, 7, 36, 3, 8
FLUX = sys.modules[FluxTransformer2DModel.__module__]


class FluxBench(Bench):
    @property
    def attentions(self):
        blocks = self.pipe.transformer
        return [block.attn for block in [*blocks.transformer_blocks, *blocks.single_transformer_blocks]]


@pytest.fixture
def bench():
    config = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": HEADS, "attention_head_dim": DIM}
    texts = {"joint_attention_dim": 12, "pooled_projection_dim": 10, "guidance_embeds": True}
    model = FluxTransformer2DModel(patch_size=1, in_channels=16, axes_dims_rope=(2, 2, 4), **config, **texts)
    randomise(model, 0, sharp=(".attn.",))
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae(1), None, None, None, None, model)
    pipe.to(torch.float64)
    pipe.set_progress_bar_config(disable=True)

    def inputs(seed=0, images=1, true_cfg=1.0, **more):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(images, *shape, generator=generator, dtype=torch.float64)

        call = {"prompt_embeds": draw(TEXT, 12), "pooled_prompt_embeds": draw(10), "true_cfg_scale": true_cfg}
        negative = {"negative_prompt_embeds": draw(TEXT, 12), "negative_pooled_prompt_embeds": draw(10)}
        size = {"height": 24, "width": 24, "num_inference_steps": STEPS, "output_type": "latent", "generator": generator}
        return call | negative | size | more

    return FluxBench(pipe, True, VISUAL, inputs, TEXT)


def flux_plan(bench, cells, guided=False, **more):
    return ah.Plan(tuple(map(tuple, cells)), target_of(find(bench.pipe)), Tokens(VISUAL, TEXT, True), guided, **more)


class Replayed:
    """A processor that computes its heads from the formulas; `column` has the site's cells, `kept` what its heads gave last."""

    def __init__(self, column):
        self.steps, self.kept, self.residuals, self.output = iter(column), {}, {}, None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        cell = next(self.steps)
        if cell == AST:
            return self.output
        streams = [("to_{}", "norm_{}", hidden_states)]
        if encoder_hidden_states is not None:
            streams.insert(0, ("add_{}_proj", "norm_added_{}", encoder_hidden_states))
        q, k, v = (
            torch.cat([self.normed(attn, norm, n, getattr(attn, linear.format(n))(x)) for linear, norm, x in streams], 1)
            for n in "qkv"
        )  # (B, N, H, D)
        q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        outs = [self.head(h, m, q[:, :, h], k[:, :, h], v[:, :, h]) for h, m in enumerate(cell.methods(HEADS))]
        out = torch.stack(outs, 2).flatten(2)
        if encoder_hidden_states is not None:
            out = attn.to_out[0](out[:, TEXT:]), attn.to_add_out(out[:, :TEXT])
        self.output = out
        return out

    @staticmethod
    def normed(attn, norm, name, x):
        x = x.unflatten(-1, (HEADS, DIM))
        return x if name == "v" else getattr(attn, norm.format(name))(x)

    def head(self, h, method, q, k, v):
        if isinstance(method, Cached):
            return self.kept[h]

        def attention(mask):
            return (q @ k.mT / DIM**0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v

        everything = torch.ones(TEXT + VISUAL, TEXT + VISUAL, dtype=torch.bool)
        masks = {radius: dense_mask(Tokens(VISUAL, TEXT, True), radius) for radius in (2, 5)}
        out = attention(masks[method.radius] if isinstance(method, Arrow) else everything)
        if isinstance(method, Full):
            self.residuals |= {(h, radius): out - attention(mask) for radius, mask in masks.items()}
        elif method.residual:
            out = out + self.residuals[h, method.radius]
        self.kept[h] = out
        return out


def random_cells(seed):
    """Steps × sites: a full step, then anything."""
    draw = random.Random(seed)
    kinds = [Full(), Cached(), *(Arrow(radius, residual) for radius in (2, 5) for residual in (False, True))]

    def some():
        return AST if draw.random() < 0.15 else Attend(tuple(draw.choice(kinds) for _ in range(HEADS)))

    return [[FULL] * 4, *([some() for _ in range(4)] for _ in range(STEPS - 1))]


@pytest.mark.parametrize("seed", range(5))
def test_heads_are_what_a_replay_gives(bench, seed):
    cells, images = random_cells(seed), 1 + seed % 2
    with ah.applied(bench.pipe, flux_plan(bench, cells)) as run:
        given = trace(bench, bench.inputs(seed, images))
        summary = run.summary()
    with processors(bench, [Replayed(column) for column in zip(*cells, strict=True)]):
        wanted = trace(bench, bench.inputs(seed, images))
    assert_same(given, wanted)
    assert distance(given, trace(bench, bench.inputs(seed, images))) > 1e-3
    assert summary.flops.module == pytest.approx(flux_plan(bench, cells).flops().module)
    assert summary.peak_cache_bytes == max(flux_plan(bench, cells).cache_bytes(images, 8))


@pytest.mark.parametrize("true_cfg", [1.0, 3.0])
def test_full_plans_change_nothing(bench, true_cfg):
    guided = true_cfg > 1
    full = flux_plan(bench, [[FULL] * 4] * STEPS, guided, calls=1 + guided)
    untouched, dispatch = trace(bench, bench.inputs(true_cfg=true_cfg)), FLUX.dispatch_attention_fn
    with left_as_it_was(bench, true_cfg=true_cfg):
        with ah.applied(bench.pipe, full):
            assert FLUX.dispatch_attention_fn is dispatch  # a plan changes no name of a module
            assert_identical(trace(bench, bench.inputs(true_cfg=true_cfg)), untouched)
        assert FLUX.dispatch_attention_fn is dispatch


@pytest.mark.parametrize("true_cfg", [1.0, 3.0])
@pytest.mark.parametrize(
    "strategy", ["greedy", Headwise(radii=(2, 5), share_cfg=True, residual=True)], ids=["greedy", "headwise"]
)
def test_searches_compress_and_their_plans_run(bench, strategy, true_cfg):
    inputs = {"images": 2, "true_cfg": true_cfg}
    plan = ah.search(bench.pipe, bench.inputs(**inputs), strategy=strategy, threshold=0.7, progress=False)
    assert plan.tokens == Tokens(VISUAL, TEXT, text_first=True)
    assert plan.flops().module < 0.9
    with left_as_it_was(bench), ah.applied(bench.pipe, plan) as run:
        bench.pipe(**bench.inputs(**inputs))
        assert run.summary().flops.attention == pytest.approx(plan.flops().attention)
        assert run.summary().peak_cache_bytes == max(plan.cache_bytes(2, 8))


def test_single_stream_blocks_have_no_output_projection_to_count(bench):
    double, single = find(bench.pipe).sites[0], find(bench.pipe).sites[-1]
    assert (double.projects_out, single.projects_out) == ("all", "none")
    width, n = HEADS * DIM, TEXT + VISUAL
    reused = flux_plan(bench, [[FULL] * 4, [FULL, FULL, FULL, AST], *[[FULL] * 4] * (STEPS - 2)]).flops().module
    matmuls, projection = 4 * n * n * width, 2 * n * width * width
    whole = STEPS * (4 * matmuls + 2 * 4 * projection + 2 * 3 * projection)
    assert 1 - reused == pytest.approx((matmuls + 3 * projection) / whole)


def test_another_length_of_text_is_no_other_circumstance(bench):
    plan = flux_plan(bench, [[FULL] * 4, *[[wa_rs(2)] * 4] * (STEPS - 1)])
    longer = torch.randn(1, TEXT + 2, 12, dtype=torch.float64)
    with ah.applied(bench.pipe, plan, changes="refuse") as run:
        bench.pipe(**bench.inputs(prompt_embeds=longer))
        assert run.summary().notes == ()
        flops = replace(plan, tokens=replace(plan.tokens, text=TEXT + 2)).flops()
        assert run.summary().flops.module == pytest.approx(flops.module)
