"""What the tests of the budget's search share: pipelines of every family, tables at random, columns and what they do.

Nothing of the search is used here but its value types.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from pipelines import CAPTION, POOLED, Bench, dit, pixart_sigma, randomise, sd3, vae
from torch import Tensor

from arrowhead.layout import Branches, Site, Tokens
from arrowhead.lifetimes import FOREVER, Residual, Writes
from arrowhead.methods import AST, Arrow, Attend, Cached, Cell, Full, Reuse
from arrowhead.plan import Target
from arrowhead.search.budget.given import Choices, Given
from arrowhead.search.budget.table import Table

FLUX_VISUAL = 16


class FluxBench(Bench):
    """Of FLUX, whose sites lie in two kinds of blocks."""

    @property
    def attentions(self) -> list[Any]:
        blocks = self.pipe.transformer
        return [block.attn for block in [*blocks.transformer_blocks, *blocks.single_transformer_blocks]]


def flux(dtype: torch.dtype = torch.float64, seed: int = 0) -> FluxBench:
    """Text before the image; with guidance two calls of the transformer a step, without it one."""
    config = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 16}
    texts = {"joint_attention_dim": CAPTION[1], "pooled_projection_dim": POOLED, "guidance_embeds": True}
    model = FluxTransformer2DModel(patch_size=1, axes_dims_rope=(2, 2, 4), **config, **texts)
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

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = own(self, *args, **kwargs)
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
) -> Table:
    """Products at random, of sizes that differ from site to site by factors of up to ten, and grow with age.

    `count` blocks of a site with so many heads, and of a feed-forward after it. `uneven`: heads differ by far more, and
    branches by less, so that heads of a site part ways.
    """
    draw = torch.Generator().manual_seed(seed)
    sites: list[Site] = []
    for i in range(count):
        sites.append(Site(f"blocks.{i}.attn", heads, 8, 16))
        if feed_forward:
            sites.append(Site(f"blocks.{i}.ff", 1, 16, 16, heads_apart=False, kind="feed_forward", weights=16 * 16 * 8))
    pairs, all_heads, samples = 3 if guided else 1, sum(site.heads for site in sites), 4
    size = torch.rand(1, all_heads, 1, 1, 1, generator=draw).mul(2.3).exp()
    age = torch.arange(ages + 1).view(1, 1, -1, 1, 1)
    outputs = torch.randn(steps, all_heads, ages + 1, pairs, samples, generator=draw) * size * age**0.7
    if guided:  # (u, c) − (u, u), which does not vanish at age 0
        outputs[..., 2, :] += torch.randn(steps, all_heads, 1, samples, generator=draw) * size[..., 0, :] * 0.5
    residuals = torch.randn(steps, all_heads, len(radii), 1, pairs, samples, generator=draw) * size[:, :, None]
    residuals = residuals + torch.randn(steps, all_heads, len(radii), ages + 1, pairs, samples, generator=draw) * 0.3
    of_kind = [site.kind for site in sites for _ in range(site.heads)]
    residuals[:, [head for head, kind in enumerate(of_kind) if kind == "feed_forward"]] = 0
    if uneven:
        outputs[..., 2, :] = outputs[..., 1, :] + 0.5 * torch.randn(steps, all_heads, ages + 1, samples, generator=draw)
        outputs *= torch.randn(1, all_heads, 1, 1, 1, generator=draw).mul(1.5).exp()
        residuals *= 0.3 * torch.randn(1, all_heads, 1, 1, 1, 1, generator=draw).mul(1.5).exp()
    gains = (torch.rand(steps, generator=draw) + 0.1).tolist()
    branches = Branches("two_calls" if calls == 2 else "cond_first", guided)
    target = Target("Transformer", "Scheduler", {"shift": 3.0}, tuple(sites))
    other = 1e5 if feed_forward else 0.0
    return Table(target, Tokens(64, text), branches, radii, ages, outputs, residuals, tuple(gains), 0.7, 96, other)


@dataclass(frozen=True)
class Past:
    """A column so far: its cells with what they write, what each gave, and the steps that can still be built on.

    `output` is (step, radius, step of the residual added or None, whether that was shared, share) of what was computed last;
    `full` is (step, whether it was shared, the residual's radius or None, whether for one branch) of the last full step.
    """

    spent: tuple[tuple[Cell, Writes], ...] = ()
    gave: tuple[Given, ...] = ()
    output: tuple | None = None
    full: tuple | None = None


def described(output: tuple, step: int) -> Given:
    """What a step gives that gives this output."""
    made, radius, residual, residual_shared, share = output
    return Given(step - made, radius, None if residual is None else step - residual, residual_shared, share)


def continued(past: Past, choices: Choices) -> Iterator[Past]:
    """Every step that may follow."""
    step = len(past.gave)
    shares = (False, True) if choices.share_cfg else (False,)

    def after(cell: Cell, output: tuple, full: tuple, writes: Writes = Writes()) -> Past:  # noqa: B008, frozen
        return Past((*past.spent, (cell, writes)), (*past.gave, described(output, step)), output, full)

    for share in shares:
        output = (step, None, None, False, share)
        yield after(Attend(Full(), share), output, (step, share, None, False))
        for radius in choices.radii if choices.residual else ():
            for half in (False, True) if choices.share_cfg and not share else (False,):
                kept = Writes(residuals=(Residual(radius, FOREVER, conditional_only=half),))
                yield after(Attend(Full(), share), output, (step, share, radius, half), kept)
    if past.full is None:
        return
    made, full_shared, radius, half = past.full
    residual = radius is not None and step - made <= choices.ages
    oldest = min(past.output[0], past.output[0] if past.output[2] is None else past.output[2])
    output_there = step - oldest <= choices.ages
    if not residual and not output_there:
        return
    for share in shares:
        for own in () if residual else choices.radii:
            yield after(Attend(Arrow(own), share), (step, own, None, False, share), past.full)
        if residual and (share or not half):
            yield after(Attend(Arrow(radius, True), share), (step, radius, made, full_shared, share), past.full)
    if choices.reuse and output_there:
        yield after(AST, past.output, past.full)


def every_column(choices: Choices, steps: int) -> list[Past]:
    columns = [Past()]
    for _ in range(steps):
        columns = [longer for column in columns for longer in continued(column, choices)]
    return columns


def damage_of(table: Table, heads: Sequence[int], column: Sequence[Cell]) -> float:
    """Of heads of one site that do the same: the square of what a column changes, as the table's docstring has its products."""
    outputs, residuals = table.outputs[:, list(heads)].double().sum(1), table.residuals[:, list(heads)].double().sum(1)
    branches = [("c", 0)] if not table.branches.guided else [("c", 0), ("u", 1)]
    found = 0.0
    made: tuple[int, int | None, bool] = (0, None, False)  # when, of which radius (None: full), shared
    added: tuple[int, bool] | None = None  # when the residual was made that it has, and whether that was shared
    full, shared = (0, False), False
    for step, cell in enumerate(column):
        shared = shared if isinstance(cell, Reuse) else cell.share_cfg  # a cached head's output, too, then serves both branches
        if isinstance(cell, Attend) and not isinstance(cell.method, Cached):
            made, added = (step, getattr(cell.method, "radius", None), cell.share_cfg), None
            if isinstance(cell.method, Full):
                full = (step, cell.share_cfg)
            elif cell.method.residual:
                added = full
        change = torch.zeros(outputs.shape[-1], dtype=torch.float64)
        for branch, own in branches:
            source = 2 if (made[2] or shared) and branch == "u" else own
            change += outputs[step, step - made[0], source]
            if made[1] is not None:
                radius = table.radii.index(made[1])
                change -= residuals[step, radius, step - made[0], source]
                if added is not None:
                    source = 2 if (made[2] or added[1] or shared) and branch == "u" else own
                    change += residuals[step, radius, step - added[0], source]
        found += table.gains[step] ** 2 / (table.final * table.elements) * (change**2).mean().item()
    return found
