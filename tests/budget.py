"""What the tests of the budget's search share: pipelines of every family, tables at random, columns and what they do.

Nothing of the search is used here but its value types.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from itertools import product
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from pipelines import CAPTION, POOLED, Bench, dit, pixart_sigma, randomise, sd3, vae
from torch import Tensor

from arrowhead.plans.cells import AST, Arrow, Attend, Cached, Cell, Full, Precision, Reuse
from arrowhead.plans.layout import Branches, Site, Tokens
from arrowhead.plans.lifetimes import FOREVER, Residual, Writes
from arrowhead.plans.target import Target
from arrowhead.searches.budget.sensitivity.site_outputs import (
    AddedResidual,
    ComputedOutput,
    ExtrapolatedOutput,
    RepeatedOutput,
    SiteOutput,
    StoredOutput,
)
from arrowhead.searches.budget.sensitivity.table import Table
from arrowhead.searches.budget.solver.states import Choices

FLUX_VISUAL = 16

SLOPES = (0.5, 0.75, 1.0)


class FluxBench(Bench):
    """Of FLUX, whose sites lie in two kinds of blocks."""

    @property
    def attentions(self) -> list[Any]:
        blocks = self.pipe.transformer
        return [block.attn for block in [*blocks.transformer_blocks, *blocks.single_transformer_blocks]]


def flux(dtype: torch.dtype = torch.float64, seed: int = 0, **more: Any) -> FluxBench:
    """Text before the image; with guidance two calls of the transformer a step, without it one."""
    config = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 16}
    texts = {"joint_attention_dim": CAPTION[1], "pooled_projection_dim": POOLED, "guidance_embeds": True}
    model = FluxTransformer2DModel(patch_size=1, axes_dims_rope=(2, 2, 4), **config | more, **texts)
    randomise(model, seed, sharp=(".attn.",))
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae(seed + 1), None, None, None, None, model)
    pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)

    def inputs(seed: int = 0, images: int = 1, guidance: float = 3.0, steps: int = 5, **more: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(images, *shape, generator=generator, dtype=torch.float64).to(dtype)

        call = {"prompt_embeds": draw(*CAPTION), "pooled_prompt_embeds": draw(POOLED), "true_cfg_scale": guidance}
        call |= {"negative_prompt_embeds": draw(*CAPTION), "negative_pooled_prompt_embeds": draw(POOLED)}
        size = {"height": 16, "width": 16, "num_inference_steps": steps, "output_type": "latent", "generator": generator}
        return call | size | more

    return FluxBench(pipe, True, FLUX_VISUAL, inputs, CAPTION[0])


FAMILIES: dict[str, Callable[..., Bench]] = {"dit": dit, "pixart_sigma": pixart_sigma, "sd3": sd3, "flux": flux}
"""[cond, uncond]; [uncond, cond] with a learned sigma; text and image together; a call of the transformer for each branch."""


def tokens_of(bench: Bench) -> Tokens:
    return Tokens(bench.visual, bench.text, text_first=isinstance(bench, FluxBench))


@contextmanager
def latents_of(bench: Bench) -> Iterator[list[Tensor]]:
    """What the scheduler gives in each step of a run within the block."""
    own, seen = type(bench.pipe.scheduler).step, []

    @wraps(own)  # pipelines look whether it takes a generator
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = own(self, *args, **kwargs)
        if self is bench.pipe.scheduler:  # a copy steps LTX-2's audio
            seen.append(out[0].clone())
        return out

    type(bench.pipe.scheduler).step = step
    try:
        yield seen
    finally:
        type(bench.pipe.scheduler).step = own


def final_latents(bench: Bench, inputs: dict[str, Any]) -> Tensor:
    """Of an ordinary run; DiT's pipeline steps both branches' rows, which are the same."""
    with latents_of(bench) as seen:
        bench.pipe(**inputs)
    return seen[-1]


def synthetic(
    seed: int,
    steps: int = 6,
    count: int = 2,
    heads: int = 2,
    radii: tuple[int, ...] = (4,),
    ages: int = 2,
    guided: bool = True,
    text: int = 0,
    calls: int = 1,
    feed_forward: bool = False,
    uneven: bool = False,
    regions: int = 1,
    blocks: bool = False,
    precisions: tuple[Precision, ...] = (),
) -> Table:
    """Products at random, of sizes that differ from site to site by factors of up to ten, and grow with age.

    `count` blocks of a site with so many heads, and of a feed-forward after it. `uneven`: heads differ by far more, and
    branches by less, so that heads of a site part ways. `blocks`: the attention lies within a block that is a site as well.
    """
    draw = torch.Generator().manual_seed(seed)
    sites: list[Site] = []
    for i in range(count):
        attention = Site(f"blocks.{i}.attn", heads, 8, 16)
        if blocks:
            own = {"separable_heads": False, "kind": "block", "weights": 16 * 16 * 9, "within": (attention,)}
            sites.append(Site(f"blocks.{i}", 1, 16, 16, **own))
        sites.append(attention)
        if feed_forward:
            sites.append(Site(f"blocks.{i}.ff", 1, 16, 16, separable_heads=False, kind="feed_forward", weights=16 * 16 * 8))
    pairs, all_heads, samples = 3 if guided else 1, sum(site.heads for site in sites), 4 * regions
    size = torch.rand(1, all_heads, 1, 1, 1, generator=draw).mul(2.3).exp()
    age = torch.arange(ages + 1).view(1, 1, -1, 1, 1)
    outputs = torch.randn(steps, all_heads, ages + 1, pairs, samples, generator=draw) * size * age**0.7
    if guided:  # (u, c) − (u, u), which does not vanish at age 0
        outputs[..., 2, :] += torch.randn(steps, all_heads, 1, samples, generator=draw) * size[..., 0, :] * 0.5
    residuals = torch.randn(steps, all_heads, len(radii), 1, pairs, samples, generator=draw) * size[:, :, None]
    residuals = residuals + torch.randn(steps, all_heads, len(radii), ages + 1, pairs, samples, generator=draw) * 0.3
    of_kind = [site.kind for site in sites for _ in range(site.heads)]
    residuals[:, [head for head, kind in enumerate(of_kind) if kind != "self_attention"]] = 0
    if uneven:
        outputs[..., 2, :] = outputs[..., 1, :] + 0.5 * torch.randn(steps, all_heads, ages + 1, samples, generator=draw)
        outputs *= torch.randn(1, all_heads, 1, 1, 1, generator=draw).mul(1.5).exp()
        residuals *= 0.3 * torch.randn(1, all_heads, 1, 1, 1, 1, generator=draw).mul(1.5).exp()
    gains = (torch.rand(steps, generator=draw) + 0.1).tolist()
    branches = Branches("two_calls" if calls == 2 else "cond_first", guided)
    target = Target("Transformer", "Scheduler", {"shift": 3.0}, tuple(sites))
    other = 1e5 if feed_forward or blocks else 0.0
    table = Table(target, Tokens(64, text), branches, radii, ages, outputs, residuals, tuple(gains), 0.7, 96, other, 1, regions)
    if not precisions:
        return table
    errors = torch.randn(steps, all_heads, len(precisions), ages + 1, pairs, samples, generator=draw)
    errors *= 0.1 * size[:, :, None]
    return replace(table, precisions=precisions, quantisation_errors=errors)


@dataclass(frozen=True)
class Past:
    """A column so far: its cells with what they write, what each gave, and the steps that can still be built on.

    `output` is (step, radius, step of the residual added or None, whether that was shared, share, precision) of what was
    computed last; `full` is (step, whether it was shared, the residual's radius or None, whether for one branch) of the last
    step that was full and native.
    `before` is the output before that, where a line may go through both; `slope` is of the line that goes on, or 0.
    """

    spent: tuple[tuple[Cell, Writes], ...] = ()
    gave: tuple[SiteOutput, ...] = ()
    output: tuple | None = None
    full: tuple | None = None
    before: tuple | None = None
    slope: float = 0.0


def described(output: tuple, step: int) -> StoredOutput:
    """What a step gives that gives this output."""
    made, radius, residual, residual_shared, share, precision = output
    added = None if residual is None else AddedResidual(made - residual, residual_shared)
    computed = ComputedOutput(radius, added, share, precision)
    return computed if made == step else RepeatedOutput(computed, step - made)


def continued(past: Past, choices: Choices) -> Iterator[Past]:
    """Every step that may follow."""
    step = len(past.gave)
    shares = (False, True) if choices.share_cfg else (False,)

    def after(
        cell: Cell,
        output: tuple,
        full: tuple | None,
        writes: Writes = Writes(),  # noqa: B008, frozen
        before: tuple | None = None,
        slope: float = 0.0,
    ) -> Past:
        given = described(output, step)
        if slope:
            since, gap = step - output[0], output[0] - before[0]
            given = ExtrapolatedOutput(given, described(before, step), slope, since, gap)
        return Past((*past.spent, (cell, writes)), (*past.gave, given), output, full, before, slope)

    for share in shares:
        for other in choices.precisions:
            yield after(Attend(Full(other), share), (step, None, None, False, share, other), past.full)
        output = (step, None, None, False, share, "native")
        alike = choices.slopes and past.output is not None and past.output[1] is None and past.output[4:] == output[4:]
        yield after(Attend(Full(), share), output, (step, share, None, False), before=past.output if alike else None)
        for radius in choices.radii if choices.residual else ():
            for half in (False, True) if choices.share_cfg and not share else (False,):
                kept = Writes(residuals=(Residual(radius, FOREVER, conditional_only=half),))
                yield after(Attend(Full(), share), output, (step, share, radius, half), kept)
    if past.output is None:
        return
    made, full_shared, radius, half = past.full or (step, False, None, False)
    residual = radius is not None and step - made <= choices.ages
    oldest = min(past.output[0], past.output[0] if past.output[2] is None else past.output[2])
    output_there = step - oldest <= choices.ages
    if not residual and not output_there:
        return
    for share, precision in product(shares, ("native", *choices.precisions)):
        for own in () if residual else choices.radii:
            yield after(Attend(Arrow(own, False, precision), share), (step, own, None, False, share, precision), past.full)
        if residual and (share or not half):
            output = (step, radius, made, full_shared, share, precision)
            yield after(Attend(Arrow(radius, True, precision), share), output, past.full)
    if choices.reuse and output_there:
        line = past.before is not None and step - past.before[0] <= choices.ages
        if not (line and past.slope):
            yield after(AST, past.output, past.full)
        for slope in ((past.slope,) if past.slope else choices.slopes) if line else ():
            yield after(Reuse(slope), past.output, past.full, before=past.before, slope=slope)


def every_column(choices: Choices, steps: int) -> list[Past]:
    columns = [Past()]
    for _ in range(steps):
        columns = [longer for column in columns for longer in continued(column, choices)]
    return columns


@dataclass(frozen=True)
class Made:
    """An output: of which step, of which radius (None: full), whether one branch's for both; so too the residual it has.

    And of which precision.
    """

    step: int
    radius: int | None = None
    shared: bool = False
    added: tuple[int, bool] | None = None
    precision: Precision = "native"


def column_errors(table: Table, heads: Sequence[int], column: Sequence[Cell]) -> list[float]:
    """Of heads of one site that do the same, in each step, as the table's docstring has its products.

    What is repeated, or continued, has been so since it was computed: a step does what it adds to the square of the sum.
    """
    outputs, residuals = table.outputs[:, list(heads)].double().sum(1), table.residuals[:, list(heads)].double().sum(1)
    branches = [0, 1] if table.branches.guided else [0]

    def change(step: int, made: Made) -> Tensor:
        found = torch.zeros(outputs.shape[-1], dtype=torch.float64)
        for own in branches:
            source = 2 if made.shared and own else own
            found += outputs[step, step - made.step, source]
            if made.precision != "native":
                which = table.precisions.index(made.precision)
                found += table.quantisation_errors[step, list(heads), which, step - made.step, source].double().sum(0)
            if made.radius is not None:
                radius = table.radii.index(made.radius)
                found -= residuals[step, radius, step - made.step, source]
                if made.added is not None:
                    source = 2 if (made.shared or made.added[1]) and own else own
                    found += residuals[step, radius, step - made.added[0], source]
        return found

    def summed(first: int, last: int, made: Made, before: Made | None, slope: float) -> Tensor:
        found = torch.zeros(outputs.shape[-1], dtype=torch.float64)
        for step in range(first, last + 1):
            own = change(step, made)
            if before is not None and step > made.step:
                before = replace(before, shared=made.shared or before.shared)
                own += slope * (step - made.step) / (made.step - before.step) * (own - change(step, before))
            found += table.sampler_gains[step] * own
        per_image = found.view(-1, table.regions).square().sum(1)
        return per_image.mean() / (table.final * table.elements)

    found: list[float] = []
    made = whole = Made(0)
    before: Made | None = None
    full = (0, False)
    for step, cell in enumerate(column):
        slope = 0.0
        if isinstance(cell, Reuse):
            slope = cell.extrapolate
        else:
            before = whole
            if isinstance(cell.method, Cached):
                whole = replace(made, shared=made.shared or cell.share_cfg)  # it then serves both branches
            else:
                if cell.method == Full():
                    full = (step, cell.share_cfg)
                radius, residual = getattr(cell.method, "radius", None), getattr(cell.method, "residual", False)
                made = whole = Made(step, radius, cell.share_cfg, full if residual else None, cell.method.precision)
        line = before if slope else None
        so_far = summed(whole.step, step - 1, whole, line, slope)
        found.append(max((summed(whole.step, step, whole, line, slope) - so_far).item(), 0.0))
    return found


def column_error(table: Table, heads: Sequence[int], column: Sequence[Cell]) -> float:
    """All that a column does."""
    return sum(column_errors(table, heads, column))
