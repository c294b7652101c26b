"""A plan carried over to other circumstances, beside a plan that was searched for there, and blind reuse, at equal FLOPs.

    python benchmarks/resample.py dit --tools TOOLS
    python benchmarks/resample.py mmdit32 --tools TOOLS
    python benchmarks/resample.py mmdit --tools TOOLS
    python benchmarks/resample.py table

Plans are searched for at 20 steps and put on the pipeline as they are; `apply` carries them over. `searched` is a plan from a
calibration there, for the FLOPs that the carried-over plan leaves. `evenly` computes as many evenly spaced steps as those FLOPs
are worth, and repeats all sites in the others. Judged by LPIPS to the uncompressed pictures of the same
circumstances, 16 that no calibration has seen, with standard errors. `mmdit` is for other sizes alone: 32 × 32 pixels are 256
tokens, 64 × 64 are 1024; the third row puts plans of `mmdit32`, which has other weights, on it.

Pictures, tables and rows that exist are not made again, so all can be interrupted. `--only` takes some rows, `--plan` some
plans, such as `40%`. `table` prints the rows for docs/results.md. `perceptual.py`: see benchmarks/README.md.
"""

import fcntl
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import budget
import diffusers
import torch
import typer
from evidence import Judge
from shards import load_images, make_images
from torch import Tensor

import arrowhead as ah
from arrowhead.errors import ArrowheadWarning
from arrowhead.plans.cells import AST
from arrowhead.tiny import pipeline, text_to_image
from arrowhead.versions import versions

HERE = Path(__file__).parent
RESULTS = HERE / "results/resample.json"
IMAGES, BATCH, CALIBRATED = 16, 8, 4
STEPS, STRENGTH, SHIFT = 20, 0.6, 3.0
SETTINGS = {
    "40%": ah.Budget(module_flops=0.4),
    "25%": ah.Budget(module_flops=0.25),
    "40%, by head": ah.Budget(module_flops=0.4, granularity="head"),
}


class Name(StrEnum):
    """The bundled models."""

    DIT = "dit"
    MMDIT32 = "mmdit32"
    MMDIT = "mmdit"


@dataclass(frozen=True)
class Circumstances:
    """How pictures are made: steps, a scheduler by class and settings, the strength of a start from a picture, the size."""

    steps: int = STEPS
    scheduler: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    strength: float = 1.0
    side: int | None = None

    @property
    def key(self) -> str:
        """A name for files."""
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


SHIFTS = {Name.DIT: "flow_shift", Name.MMDIT32: "shift"}
SCHEDULERS = {Name.DIT: ("UniPCMultistep",), Name.MMDIT32: ("DPMSolverMultistep", "FlowMatchHeunDiscrete")}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
HOME = Circumstances()


def rows_of(name: Name) -> dict[str, tuple[Name, Circumstances, Circumstances]]:
    """Each row's name: the model whose plan it is, what the plan was searched under, and what it is carried over to."""
    if name is Name.MMDIT:
        small, large = Circumstances(side=32), HOME
        return {
            "256 to 1024 tokens": (name, small, large),
            "1024 to 256 tokens": (name, large, small),
            "256 to 1024 tokens, plan of mmdit32": (Name.MMDIT32, HOME, large),
        }
    found = {f"steps × {part:g}": Circumstances(round(STEPS * part)) for part in (0.5, 0.7, 1.5, 2)}
    found |= {
        f"shift {SHIFT:g}": Circumstances(settings={SHIFTS[name]: SHIFT}),
        **{f"scheduler {scheduler}": Circumstances(scheduler=scheduler) for scheduler in SCHEDULERS[name]},
        f"strength {STRENGTH:g}": Circumstances(strength=STRENGTH),
        "as searched": HOME,
    }
    return {row: (name, HOME, there) for row, there in found.items()}


class Bench:
    """A bundled model under circumstances, with what was made there."""

    def __init__(self, name: Name, there: Circumstances) -> None:
        self.name, self.there, self.pipe = name, there, ah.tiny.load(name)
        self.case = budget.CASES[budget.Name.DIT if name is Name.DIT else budget.Name.MMDIT32]
        self.work = budget.work_of(name).parent.with_name("resample") / f"{budget.work_of(name).name}-{there.key}"  # type: ignore[arg-type]
        self.work.mkdir(parents=True, exist_ok=True)
        if there.scheduler or there.settings:
            own = self.pipe.scheduler
            kind = getattr(diffusers, f"{there.scheduler}Scheduler") if there.scheduler else type(own)
            config = {**own.config, **(FLOW if there.scheduler.endswith("Multistep") else {}), **there.settings}
            self.pipe.scheduler = kind.from_config({key: value for key, value in config.items() if not key.startswith("_")})

    def call(self, asked: list[Any], generator: Any) -> dict[str, Any]:
        """The arguments of the pipeline's call."""
        size = {} if self.there.side is None else {"height": self.there.side, "width": self.there.side}
        steps = {"num_inference_steps": self.there.steps}
        return {**self.case.common, **steps, **size, self.case.asks: asked, "generator": generator}

    @contextmanager
    def started(self, pictures: Callable[[], Tensor]) -> Iterator[None]:
        """Within the block calls start from `pictures`, (B, 3, H, W) in [0, 1], where the circumstances say so."""
        if self.there.strength == 1:
            yield
            return
        module: Any = pipeline if self.name is Name.DIT else text_to_image
        scheduler, own_noise, own_steps = self.pipe.scheduler, module.randn_tensor, self.pipe.scheduler.set_timesteps
        start = pictures() * 2 - 1
        left_out = self.there.steps - int(self.there.steps * self.there.strength)

        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            own_steps(*args, **kwargs)
            scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[left_out:], scheduler.sigmas[left_out:]
            scheduler.num_inference_steps = len(scheduler.timesteps)

        def noised(*args: Any, **kwargs: Any) -> Tensor:
            own_steps(self.there.steps)
            sigma = scheduler.sigmas[left_out]
            return sigma * own_noise(*args, **kwargs) + (1 - sigma) * start

        scheduler.set_timesteps, module.randn_tensor = set_timesteps, noised
        try:
            yield
        finally:
            del scheduler.set_timesteps
            module.randn_tensor = own_noise

    def table(self) -> ah.Table:
        """A calibration here."""
        path = self.work / "table.safetensors"
        if not path.exists():
            asked = self.case.calibration[:CALIBRATED]
            generator = torch.Generator().manual_seed(budget.SEED)
            with self.started(lambda: Bench(self.name, HOME).pictures("starts of the calibration", seed=5000, asked=asked)):
                ah.calibrate(self.pipe, self.call(asked, generator), progress=False).save(path)
        return ah.Table.load(path)

    def pictures(self, folder: str, plan: ah.Plan | None = None, seed: int = 1, asked: list[Any] | None = None) -> Tensor:
        """Picture i has input i and seed `seed` + i: (n, 3, H, W) in [0, 1]."""
        asked = self.case.images[:IMAGES] if asked is None else asked

        def starts(part: slice) -> Tensor:
            others = asked[::-1]  # a picture of something else
            return Bench(self.name, HOME).pictures("starts", seed=6000, asked=others)[part]

        def make(start: int) -> Tensor:
            part = slice(start, min(start + BATCH, len(asked)))
            generators = [torch.Generator().manual_seed(seed + i) for i in range(start, part.stop)]
            with self.started(lambda: starts(part)):
                return self.pipe(**self.call(asked[part], generators)).images

        if plan is None:
            make_images(self.work / folder, range(0, len(asked), BATCH), make)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ArrowheadWarning)
                with ah.applied(self.pipe, plan):
                    make_images(self.work / folder, range(0, len(asked), BATCH), make)
        return load_images(self.work / folder)

    def conditions(self) -> dict[str, Any]:
        """The levels and tokens of a call here, as `Plan.resample` takes them: those of a calibration."""
        table = self.table()
        return {"levels": table.target.levels, "tokens": table.tokens}


def key_of(plan: ah.Plan) -> str:
    """A plan's name for files, by what it does."""
    return sha256(repr((plan.cells, plan.target.levels, plan.tokens)).encode()).hexdigest()[:12]


def row_of(searched: Bench, bench: Bench, asked: ah.Budget, judge: Judge) -> dict[str, Any]:
    """A plan that was searched for elsewhere, one that is searched for here at its FLOPs, and even reuse, on pictures here."""
    plan, raw = ah.solve(searched.table(), asked), bench.pictures("raw")
    carried = plan.resample(**bench.conditions())  # what `apply` follows; the pictures are made by `apply` itself
    left, table = carried.flops().module, bench.table()
    here = ah.solve(table, ah.Budget(module_flops=max(left, 1 / carried.steps), granularity=asked.granularity))
    plans = {"adapted": plan, "searched": here, "evenly": budget.uniform(here, left, AST)}
    found: dict[str, Any] = {}
    distances: dict[str, Tensor] = {}
    for kind, used in plans.items():
        followed = carried if kind == "adapted" else used
        made = bench.pictures(f"{kind} {key_of(followed)}", used)
        distances[kind] = judge.lpips(made * 2 - 1, raw * 2 - 1)
        found[kind] = {"module_flops": followed.flops().module, "steps": followed.steps, **judge(made, raw)}
    for other in ("searched", "evenly"):
        apart = distances["adapted"] - distances[other]
        found[f"adapted less {other}"] = {"lpips": float(apart.mean()), "lpips_standard_error": error_of(apart)}
    return found


def error_of(values: Tensor) -> float:
    """The standard error of a mean."""
    return float(values.std() / len(values) ** 0.5)


def store(name: Name, row: str, setting: str, found: dict[str, Any]) -> None:
    """Add a row to the results; other processes may do so, too."""
    with (HERE / "results/.resample.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results |= {
            "command": "see the head of benchmarks/resample.py",
            "date": datetime.now(UTC).date().isoformat(),
            "device": "cpu, float32, one thread, beside other loads",
            "pictures": IMAGES,
            "versions": versions(),
        }
        results.setdefault(name, {}).setdefault(row, {})[setting] = found
        RESULTS.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")


app = typer.Typer(add_completion=False)
Tools = Annotated[Path, typer.Option(help="folder of perceptual.py")]
Names = Annotated[list[str] | None, typer.Option()]


def measured(name: Name, tools: Path, only: list[str] | None, plan: list[str] | None, again: bool) -> None:
    """All rows of a model that are not there yet."""
    torch.set_num_threads(1)
    judge = Judge(tools)
    for setting, asked in SETTINGS.items():
        for row, (owner, before, after) in rows_of(name).items():
            there = json.loads(RESULTS.read_text()).get(name, {}).get(row, {}) if RESULTS.exists() else {}
            if (only and row not in only) or (plan and setting not in plan) or (setting in there and not again):
                continue
            found = row_of(Bench(owner, before), Bench(name, after), asked, judge)
            store(name, row, setting, found)
            typer.echo(f"{name}, {row}, {setting}: {shown(found)}")


def shown(found: dict[str, Any]) -> str:
    """A row for people to read: each plan's LPIPS with its standard error, in thousandths."""
    parts = [f"{1000 * found[kind]['lpips']:.2f} ± {1000 * found[kind]['lpips_standard_error']:.2f}" for kind in KINDS]
    return f"{found['adapted']['module_flops']:.0%} | " + " | ".join(parts)


KINDS = ("adapted", "searched", "evenly")


@app.command()
def dit(tools: Tools, only: Names = None, plan: Names = None, again: bool = False) -> None:
    """Other steps, shift, schedulers and strength on the DiT."""
    measured(Name.DIT, tools, only, plan, again)


@app.command()
def mmdit32(tools: Tools, only: Names = None, plan: Names = None, again: bool = False) -> None:
    """Other steps, shift, schedulers and strength on the MMDiT."""
    measured(Name.MMDIT32, tools, only, plan, again)


@app.command()
def mmdit(tools: Tools, only: Names = None, plan: Names = None, again: bool = False) -> None:
    """Other sizes, on the larger MMDiT."""
    measured(Name.MMDIT, tools, only, plan, again)


@app.command()
def table() -> None:
    """Print the results as Markdown."""
    results = json.loads(RESULTS.read_text())
    for name in Name:
        typer.echo(f"\n| {name} | plan | FLOPs left | carried over | searched there | evenly |\n|---|---|---|---|---|---|")
        for row, settings in results.get(name, {}).items():
            for setting, found in settings.items():
                typer.echo(f"| {row} | {setting} | {shown(found)} |")


if __name__ == "__main__":
    sys.exit(app())
