"""The time saved, end to end, by not projecting Q, K and V of cached heads, by the number of cached heads.

    python benchmarks/projections.py

A transformer as Stable Diffusion 3's, 4 blocks of 8 heads of 64, random weights, 1024 visual tokens and 154 of text, guided.
All heads are computed in the first step; in the three after it, some are cached. The same plan runs with their
projections left out, as always, and with all heads projected. CPU, one thread, process time; every round runs all settings
one after the other, and a figure is the median over the rounds of a ratio within a round. Where no head is cached, the two are
the same: what is "saved" there is noise.
"""

import json
import os
import platform
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tqdm import tqdm

import arrowhead as ah
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import FULL, Attend, Cached, Full
from arrowhead.plans.layout import Tokens
from arrowhead.versions import versions

HEADS, HEAD_DIM, TEXT, SIDE, STEPS = 8, 64, 154, 32, 4
CACHED = (0, 2, 4, 6)  # heads
WIDTHS = {"joint_attention_dim": 256, "pooled_projection_dim": 128}
HERE = Path(__file__).parent


def pipeline() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "caption_projection_dim": HEADS * HEAD_DIM}
    transformer = SD3Transformer2DModel(num_layers=4, sample_size=2 * SIDE, in_channels=16, **sizes, **WIDTHS)
    unused = ["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]
    pipe = StableDiffusion3Pipeline(transformer.eval(), FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(unused))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs() -> dict[str, Any]:
    """Fresh arguments of a call: the prompt as its embedding."""
    generator = torch.Generator().manual_seed(0)
    call: dict[str, Any] = {"generator": generator, "num_inference_steps": STEPS, "output_type": "latent"}
    for name in ("", "negative_"):
        call[f"{name}prompt_embeds"] = torch.randn(1, TEXT, WIDTHS["joint_attention_dim"], generator=generator)
        call[f"{name}pooled_prompt_embeds"] = torch.randn(1, WIDTHS["pooled_projection_dim"], generator=generator)
    return call | {"height": 16 * SIDE, "width": 16 * SIDE}


def plan(pipe: Any, cached: int) -> ah.Plan:
    """A plan with all heads full in the first step, and `cached` of them cached after it."""
    cell = Attend((Cached(),) * cached + (Full(),) * (HEADS - cached))
    target = target_of(find(pipe))
    sites = len(target.sites)
    return ah.Plan(((FULL,) * sites, *[(cell,) * sites] * (STEPS - 1)), target, Tokens(SIDE**2, TEXT), guided=True)


def everything_projected() -> AbstractContextManager[Any]:
    """Run as if no module could project heads separately."""
    return patch("arrowhead.engine.prepared.can_project_heads_separately", new=lambda _: False)


def module_flops(own: ah.Plan, heads_apart: bool) -> float:
    sites = tuple(replace(site, separable_heads=heads_apart) for site in own.target.sites)
    return replace(own, target=replace(own.target, sites=sites)).flops().module


def main(
    out: Annotated[Path, typer.Option(help="JSON file for the results")] = HERE / "results/projections_cpu.json",
    rounds: Annotated[int, typer.Option(help="rounds")] = 5,
) -> None:
    """Measure, and write the results."""
    torch.set_num_threads(1)
    pipe = pipeline()
    plans = {cached: plan(pipe, cached) for cached in CACHED}
    taken: dict[tuple[int, bool] | None, list[float]] = {None: []}
    taken |= {(cached, skips): [] for cached in CACHED for skips in (True, False)}
    for _ in tqdm(range(rounds + 1), mininterval=10):
        for setting, seconds in taken.items():
            applied = nullcontext() if setting is None else ah.applied(pipe, plans[setting[0]])
            with applied, nullcontext() if setting is None or setting[1] else everything_projected():
                started = time.process_time()
                pipe(**inputs())
                seconds.append(time.process_time() - started)

    def ratio(a: tuple[int, bool], b: tuple[int, bool] | None) -> float:
        return round(median(x / y for x, y in zip(taken[a][1:], taken[b][1:], strict=True)), 4)  # the first round warms up

    result = {
        "command": f"python benchmarks/projections.py --rounds {rounds}",
        "date": datetime.now(UTC).date().isoformat(),
        "device": f"CPU {platform.machine()}, one thread of {os.cpu_count()} cores, float32, process time",
        "baseline": "the untouched pipeline",
        "versions": versions(),
        "steps": STEPS,
        "rounds": rounds,
        "raw_seconds": median(taken[None][1:]),
        "rows": [
            {
                "cached": cached / HEADS,
                "time_skipping": ratio((cached, True), None),
                "time_projecting_all": ratio((cached, False), None),
                "saved_by_skipping": round(1 - ratio((cached, True), (cached, False)), 4),
                "module_flops_skipping": module_flops(plans[cached], True),
                "module_flops_projecting_all": module_flops(plans[cached], False),
            }
            for cached in CACHED
        ],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
