"""Whole transformers at the papers' sizes and FLOP levels: time end to end and of attention, relative to dense attention.

    python benchmarks/pipelines.py

Random weights, in bfloat16 on a CUDA device; seconds by CUDA events, attention's from the start of its modules to their end.
Each round runs everything one after the other: dense attention by cuDNN and by FlashAttention 2, then each plan, its full heads
by the first of these. A figure is the median over the rounds of a ratio within a round. Plans with cached heads run twice, with
the projections of these heads left out, as always, and with all heads projected.

`bound` is Amdahl's bound in FLOPs of the transformer's blocks. `bound_by_time` is Amdahl's bound if attention modules take
their measured share of the time, and the plan reduces that time as it reduces their FLOPs. Without CUDA, `--small` tries the
same on the CPU, at sizes whose times mean nothing.
"""

import gc
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch
import typer
from diffusers.utils import logging
from levels import LEVELS, Level, plan
from real_sizes import MODELS, Model
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import arrowhead as ah
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.flops import full_flops
from arrowhead.versions import versions

HERE = Path(__file__).parent
BACKENDS = {
    "cuda": {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION},
    "cpu": {"sdpa": SDPBackend.FLASH_ATTENTION},
}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


@dataclass(frozen=True)
class Clock:
    """Stamps, and the seconds between two of them once the device is done."""

    device: str

    def stamp(self) -> Any:
        """Now: a time, or an event in the device's queue."""
        if self.device == "cpu":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two stamps."""
        if self.device == "cpu":
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    @contextmanager
    def around(self, modules: Any) -> Iterator[list[tuple[Any, Any]]]:
        """Stamps before and after every call of a module."""
        passed: list[tuple[Any, Any]] = []
        begun: list[Any] = []
        hooks = []
        for module in modules:
            hooks.append(module.register_forward_pre_hook(lambda *_: begun.append(self.stamp())))
            hooks.append(module.register_forward_hook(lambda *_: passed.append((begun.pop(), self.stamp()))))
        try:
            yield passed
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True)
class Setting:
    """One way to generate: torch's backend of dense attention, a plan or none, and whether cached heads are projected, too."""

    backend: str
    plan: ah.Plan | None = None
    projects_all: bool = False

    def taken(self, pipe: Any, call: Mapping[str, Any], steps: int, device: str) -> tuple[float, float]:
        """Seconds of a generation, and of its attention modules."""
        clock = Clock(device)
        modules = find(pipe).modules.values()
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(BACKENDS[device][self.backend]))
            if self.projects_all:
                stack.enter_context(everything_projected())
            if self.plan is not None:
                stack.enter_context(ah.applied(pipe, self.plan))
            passed = stack.enter_context(clock.around(modules))
            begin = clock.stamp()
            pipe(**call, num_inference_steps=steps)
            end = clock.stamp()
        whole = clock.seconds(begin, end)
        return whole, sum(clock.seconds(*stamps) for stamps in passed)


def everything_projected() -> AbstractContextManager[Any]:
    """Run as if no module could project heads separately."""
    return patch("arrowhead.engine.prepared.can_project_heads_separately", new=lambda _: False)


def projecting_all(own: ah.Plan) -> ah.Plan:
    """The same plan, for counting FLOPs of what projects everything."""
    return replace(
        own, target=replace(own.target, sites=tuple(replace(site, separable_heads=False) for site in own.target.sites))
    )


def flops_left(pipe: Any, own: ah.Plan) -> dict[str, float]:
    """Fractions that a plan leaves: of attention, of its modules, and of all that the transformer's blocks multiply."""
    blocks = find(pipe, {"block"}).sites
    modules = full_flops(own.target.sites, own.tokens, own.samples).module
    share = modules / full_flops(blocks, own.tokens, own.samples).module
    left = own.flops()
    return {"attention": left.attention, "module": left.module, "whole": 1 - share * (1 - left.module)}


def refusal(setting: Setting, *args: Any) -> str | None:
    """The message with which torch's backend refuses to run."""
    try:
        setting.taken(*args)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None


def measure(model: Model, pipe: Any, device: str, steps: int, rounds: int) -> dict[str, Any]:
    """A model's dense seconds, and a row for each of its levels."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    call = model.call(device, DTYPES[device])
    args = pipe, call, steps, device
    refused = {name: why for name in BACKENDS[device] if (why := refusal(Setting(name), *args))}
    bases = [name for name in BACKENDS[device] if name not in refused]
    target = target_of(find(pipe))
    plans = {level: plan(level, target, model.attended, steps, guided=model.guided) for level in LEVELS[model.name]}
    settings: dict[tuple[Any, bool], Setting] = {(base, False): Setting(base) for base in bases}
    for level, own in plans.items():
        settings |= {
            (level, every): Setting(bases[0], own, every)
            for every in ((False, True) if own.count_heads()["cached"] else (False,))
        }
    seconds: dict[tuple[Any, bool], list[tuple[float, float]]] = {key: [] for key in settings}
    for setting in settings.values():
        setting.taken(*args)  # compiles, and warms up
    for _ in tqdm(range(rounds), desc=model.name, mininterval=10):
        for key, setting in settings.items():
            seconds[key].append(setting.taken(*args))

    def ratio(key: tuple[Any, bool], base: str, part: int) -> float:
        return round(median(a[part] / b[part] for a, b in zip(seconds[key], seconds[base, False], strict=True)), 4)

    def row(level: Level, own: ah.Plan, *, every: bool) -> dict[str, Any]:
        left = flops_left(pipe, projecting_all(own) if every else own)
        share = median(part / whole for whole, part in seconds[bases[0], False])
        key = level, every
        return {
            "level": level.name,
            "wanted": {level.of: level.left},
            "projections": "all" if every else "of computed heads",
            "heads": dict(own.count_heads()),
            "flops_left": {name: round(value, 4) for name, value in left.items()},
            "bound": round(1 / left["whole"], 3),
            "bound_by_time": round(1 / (1 - share * (1 - left["module"])), 3),
            "time_by": {base: ratio(key, base, 0) for base in bases},
            "attention_time_by": {base: ratio(key, base, 1) for base in bases},
            "seconds": median(whole for whole, _ in seconds[key]),
            "attention_seconds": median(part for _, part in seconds[key]),
        }

    dense = {
        base: {what: median(one[part] for one in seconds[base, False]) for part, what in enumerate(("whole", "attention"))}
        for base in bases
    }
    tokens = model.attended
    return {
        "model": model.name,
        "parameters": sum(weight.numel() for weight in pipe.transformer.parameters()),
        "tokens": tokens.visual,
        "text": tokens.text,
        "samples": 2 if model.guided else 1,
        "steps": steps,
        "rounds": rounds,
        "dense_seconds": dense,
        "refused": refused,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "rows": [row(level, plans[level], every=every) for level, every in settings if isinstance(level, Level)],
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": versions(),
    }


def draw(models: list[dict[str, Any]], path: Path) -> None:
    """Speed-up end to end of every level over each dense backend, and Amdahl's bounds."""
    rows = [(model["model"], row) for model in models for row in model["rows"] if row["projections"] != "all"]
    figure, axis = plt.subplots(figsize=(2 + 0.55 * len(rows), 4.4), layout="constrained")
    for place, base in enumerate(rows[0][1]["time_by"]):
        speeds = [1 / row["time_by"].get(base, float("nan")) for _, row in rows]
        axis.bar(
            [x + 0.36 * place - 0.18 for x in range(len(rows))],
            speeds,
            0.34,
            label=f"over {base}",
            color=("#2e8b6f", "#9fcfbd")[place],
        )
    for bound, dash in (("bound", "-"), ("bound_by_time", ":")):
        xs, ys = range(len(rows)), [row[bound] for _, row in rows]
        label = {"bound": "Amdahl's bound in FLOPs", "bound_by_time": "the same in time"}[bound]
        axis.hlines(ys, [x - 0.42 for x in xs], [x + 0.42 for x in xs], color="#c8553d", linestyle=dash, label=label)
    axis.axhline(1, color="0.6", lw=1)
    axis.set_xticks(range(len(rows)), [f"{name}\n{row['level']}" for name, row in rows], fontsize=7, rotation=60, ha="right")
    axis.set(ylabel="speed-up, end to end")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file; results/pipelines_cuda.json where it is not given")] = None,
    model: Annotated[list[str] | None, typer.Option(help="some of the models, by name; all where it is not given")] = None,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 10,
    rounds: Annotated[int, typer.Option(help="rounds")] = 3,
    small: Annotated[bool, typer.Option(help="on the CPU, two blocks and 256 tokens; needs --out")] = False,
) -> None:
    """Measure, write the results after every model, and draw them. Models that a result file has already are kept in it."""
    device = "cpu" if small else "cuda"
    if small and out is None:
        raise typer.BadParameter("--small is no result to keep; name a file with --out")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    out = out or HERE / "results/pipelines_cuda.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(out.read_text())["models"] if out.exists() else []
    done = {entry["model"]: entry for entry in found}
    for one in MODELS:
        if model and one.name not in model:
            continue
        own = one.shrunk() if small else one
        pipe = own.build(device, DTYPES[device])
        done[one.name] = measure(own, pipe, device, steps, rounds)
        del pipe
        gc.collect()  # what a plan was on is part of a cycle, and the next model needs the memory
        entries = [done[each.name] for each in MODELS if each.name in done]
        command = "python benchmarks/pipelines.py" + (" --small" if small else "")
        out.write_text(json.dumps({"command": command, "models": entries}, indent=1) + "\n")
        draw(entries, out.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
