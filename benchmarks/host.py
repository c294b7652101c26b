"""What a plan costs the host: process time of the transformer, and of its sites, by that of the untouched model.

    python benchmarks/host.py

FLUX's transformer with 19 double and 38 single blocks, 24 heads of 8, 16 visual and 8 text tokens, random weights: so small
that a call's time is Python's and the dispatcher's. The kernels that compute bands are replaced by one that gives an empty
tensor; projections, caches and copies are real. In every round one model runs a generation untouched and one under each plan,
which is applied before it and removed after it. A time is the minimum over the steps of a generation, of the whole forward or
of each site, since other processes only add to it; the first step, which is full in every plan, does not count. A ratio is the
median over rounds of this time by the untouched model's in the same round: a machine's speed changes from round to round.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from tqdm import tqdm

import arrowhead as ah
from arrowhead.kernels import dispatch
from arrowhead.kernels.call import Call
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import AST, FULL, Arrow, Attend, Cached, Cell, Full
from arrowhead.plans.layout import Tokens
from arrowhead.versions import versions

HERE = Path(__file__).parent
DOUBLE, SINGLE, HEADS, WIDTH = 19, 38, 24, 8
SIDE, TEXT, STEPS = 4, 8, 6
BARS = {
    "full": {"forward": 1.05},
    "repeated": {"site": 0.15},
    "head by head": {"forward": 1.25, "site": 1.25},
    "blocks repeated": {"forward": 0.02},
}
"""By how much of the untouched model's time each setting may take: of the transformer's forward, and of its sites alone."""


def pipeline() -> FluxPipeline:
    """57 sites; no text encoders and no decoder."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs() -> dict[str, Any]:
    """What the pipeline calls its transformer with."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[0, row, column] for row in range(SIDE) for column in range(SIDE)])
    return {
        "hidden_states": torch.randn(1, SIDE**2, 4, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": None,
        "pooled_projections": torch.randn(1, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, TEXT, 16, generator=generator),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": ids.float(),
        "return_dict": False,
    }


def mixed(step: int, site: int, residual: bool) -> Cell:
    """Heads of three kinds, others in every step and site."""
    kinds = Full(), Arrow(2, residual), Cached()
    return Attend(tuple(kinds[(head * 7 + head // 3 + step + site) % 3] for head in range(HEADS)))


def plans(pipe: FluxPipeline) -> dict[str, ah.Plan]:
    """One for each setting; the first step is full."""

    def plan(cell: Callable[[int, int], Cell], blocks: bool = False) -> ah.Plan:
        target = target_of(find(pipe, {"block"}) if blocks else find(pipe))
        count = len(target.sites)
        assert count == DOUBLE + SINGLE
        rows = [(FULL,) * count, *(tuple(cell(step, site) for site in range(count)) for step in range(1, STEPS))]
        return ah.Plan(tuple(rows), target, Tokens.of_grid(1, SIDE, SIDE, text=TEXT, text_first=True), guided=False)

    return {
        "full": plan(lambda *_: FULL),
        "repeated": plan(lambda *_: AST),
        "head by head": plan(lambda step, site: mixed(step, site, residual=False)),
        "head by head, residuals": plan(lambda step, site: mixed(step, site, residual=True)),
        "blocks repeated": plan(lambda *_: AST, blocks=True),
    }


def stub(call: Call) -> Tensor:
    """A kernel that computes nothing."""
    return torch.empty_like(call.q)


@contextmanager
def stubbed() -> Iterator[None]:
    """All kernels replaced by one that computes nothing."""
    with patch.dict(dispatch.KERNELS, dict.fromkeys(dispatch.KERNELS, stub)):
        yield


class Bench:
    """A pipeline whose transformer is run step by step, untouched or under a plan; `sites_alone`: of it the sites only."""

    def __init__(self, sites_alone: bool) -> None:
        self._pipe = pipeline()
        self._sites_alone = sites_alone
        transformer: Any = self._pipe.transformer
        self._sites = [block.attn for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)]
        self._calls = self._recorded()
        self._plans: dict[str | None, ah.Plan | None] = {None: None}
        self._plans.update(plans(self._pipe))
        if sites_alone:
            del self._plans["blocks repeated"]  # no site runs
            transformer.forward = self._run_sites
        self._best: dict[str | None, list[float]] = {}  # of the running round
        self.rounds: list[dict[str | None, float]] = []  # seconds by plan

    def _recorded(self) -> list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
        """The arguments that each site is called with."""
        calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        hooks = [site.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True) for site in self._sites]
        self._pipe.transformer(**inputs())
        for hook in hooks:
            hook.remove()
        return calls

    def _run_sites(self, **_: Any) -> None:
        self._last = [_timed(partial(site, *args, **kwargs)) for site, args, kwargs in self._calls]

    def _run_transformer(self, given: dict[str, Any]) -> list[float]:
        whole = _timed(partial(self._pipe.transformer, **given))
        return self._last if self._sites_alone else [whole]

    def round(self) -> None:
        """A generation with each plan, and one without; notes the forward's best time, or the mean of the sites' best times."""
        self._best, settings = {}, list(self._plans.items())
        first = len(self.rounds) % len(settings)  # each is the first one in its turn
        for name, plan in settings[first:] + settings[:first]:
            with nullcontext() if plan is None else ah.applied(self._pipe, plan) as run:
                self._generation(name, run)
        self.rounds.append({name: mean(best) for name, best in self._best.items()})

    def _generation(self, name: str | None, run: Any) -> None:
        scheduler, given = self._pipe.scheduler, inputs()
        scheduler.set_timesteps(STEPS)
        with nullcontext() if run is None else run.generating((), {}):
            for step, moment in enumerate(scheduler.timesteps):
                seconds = self._run_transformer(given)
                if step:
                    self._best[name] = [*map(min, self._best.get(name, seconds), seconds)]
                scheduler.step(torch.zeros_like(given["hidden_states"]), moment, given["hidden_states"])


def _timed(function: Callable[[], Any]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


@torch.inference_mode()
def measure(rounds: int) -> dict[str, Any]:
    """Seconds of the untouched model, and the ratio to them under each plan."""
    benches = {"forward": Bench(sites_alone=False), "site": Bench(sites_alone=True)}
    with stubbed():
        for _ in tqdm(range(rounds)):
            for bench in benches.values():
                bench.round()
    found: dict[str, dict[str, float]] = {}
    for kind, bench in benches.items():
        for name in bench.rounds[0]:
            if name is not None:
                found.setdefault(name, {})[kind] = median(times[name] / times[None] for times in bench.rounds)
    raw = {kind: median(times[None] for times in bench.rounds) for kind, bench in benches.items()}
    return {"raw_seconds": raw, "settings": found}


def missed(settings: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The bars that do not hold."""
    return [
        f"{name}, {kind}: {settings[name][kind]:.3f}, wanted at most {bar}"
        for name, bars in BARS.items()
        for kind, bar in bars.items()
        if settings[name][kind] > bar
    ]


def main(
    out: Annotated[Path, typer.Option(help="JSON file for the results")] = HERE / "results/host.json",
    rounds: Annotated[int, typer.Option(help="generations of each setting")] = 20,
) -> None:
    """Measure, write the results, and fail where a bar does not hold."""
    torch.set_num_threads(1)
    found = measure(rounds)
    result = {
        "command": "python benchmarks/host.py",
        "date": datetime.now(UTC).date().isoformat(),
        "device": f"CPU {platform.machine()}, one thread of {os.cpu_count()} cores that others use, float32, process time",
        "baseline": "the untouched transformer",
        "versions": versions(),
        "model": {"sites": DOUBLE + SINGLE, "heads": HEADS, "head_dim": WIDTH, "visual": SIDE**2, "text": TEXT, "steps": STEPS},
        "rounds": rounds,
        "bars": BARS,
        **found,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    typer.echo(json.dumps(found, indent=1))
    if faults := missed(found["settings"]):
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    typer.run(main)
