"""Arguments and options that commands share: the model, the inputs of its call, device, dtype and seeds."""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from arrowhead import tiny
from arrowhead.errors import InputsInvalid
from arrowhead.evaluation.request import captions
from arrowhead.plans.plan import Plan
from arrowhead.searches.budget.config import ASKED, PRESETS, Budget

ModelName = Annotated[str, typer.Argument(help="a Hub id, a local folder, tiny:dit or tiny:mmdit")]
INPUT = typer.Option(
    "--input",
    "-i",
    metavar="NAME=VALUE",
    help="an argument of the pipeline's call, e.g. num_inference_steps=50; prompt=@FILE: a line each; repeat",
)
Inputs = Annotated[list[str], INPUT]
Seeds = Annotated[int, typer.Option(help="how many seeds to generate the inputs with, from 0 on", min=1)]
Seed = Annotated[int, typer.Option(help="seed of the initial noise", min=-(2**63), max=2**64 - 1)]
Device = Annotated[str, typer.Option(help="torch device")]
Dtype = Annotated[str, typer.Option(help="torch dtype of the weights")]


def load(name: str, device: str, dtype: str) -> Any:
    """Load a pipeline: a bundled one, one from a local folder, or one from the Hub."""
    wanted = getattr(torch, dtype, None)
    if not isinstance(wanted, torch.dtype):
        raise InputsInvalid(f"got dtype {dtype!r}, wanted the name of a torch dtype, such as bfloat16")
    if name.startswith("tiny:"):
        pipe = tiny.load(name.removeprefix("tiny:"), dtype=wanted)
    else:
        from diffusers import DiffusionPipeline  # noqa: PLC0415  # takes seconds to import

        try:
            pipe = DiffusionPipeline.from_pretrained(name, dtype=wanted)
        except (OSError, ValueError) as error:
            raise InputsInvalid(
                f"cannot load {name!r}; wanted a Hub id or a pipeline's folder, or tiny:dit. {error}"
            ) from error
    try:
        return pipe.to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by device
        raise InputsInvalid(f"got device {device!r}, wanted one that torch has here, such as cpu. {error}") from error


def parse(inputs: list[str]) -> dict[str, Any]:
    """Parse `NAME=VALUE` pairs into arguments.

    `@FILE` stands for the list of the lines of a file. A value that is valid JSON is parsed; any other value is text.
    """
    parsed: dict[str, Any] = {}
    for pair in inputs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputsInvalid(f"got --input {pair!r}, wanted NAME=VALUE, such as num_inference_steps=50")
        if value.startswith("@"):
            parsed[name] = lines_of(value[1:])
            continue
        try:
            parsed[name] = json.loads(value)
        except json.JSONDecodeError:
            parsed[name] = value
        except (ValueError, RecursionError) as error:  # more digits than Python reads, and values nested too deep
            raise InputsInvalid(
                f"got --input {pair[:50]!r} … of {len(pair)} characters, which cannot be read ({error}); wanted a shorter value"
            ) from error
    return parsed


def lines_of(path: str) -> list[str]:
    """The lines of a file that stands for a value; captions of a JSON in COCO's format."""
    if not Path(path).is_file():
        raise InputsInvalid(
            f"got the value @{path:.200}, and no file of that name; wanted a file with an item in each line; or text in "
            "quotes, as JSON has it, where it begins with @"
        )
    return captions(Path(path))


def parse_budget(text: str | None) -> Budget | str | None:
    """Parse a budget: the name of a preset, or NAME=VALUE."""
    name, equals, value = (text or "").partition("=")
    if not equals:
        return text
    if name not in ASKED or not isinstance(number := parse_number(value), float):
        raise InputsInvalid(
            f"got --budget {text}, wanted a name, or one of {', '.join(ASKED)} with a number, as in module_flops=0.4"
        )
    return Budget(**{name: number})  # type: ignore[arg-type]


def parse_number(text: str | None) -> float | str | None:
    """A number, where the text is one; else the text."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def budget_of(text: str) -> Budget:
    """The budget of NAME=VALUE, of a preset's name, or of a number alone, which is a speedup."""
    found = parse_budget(f"speedup={text}" if isinstance(parse_number(text), float) else text)
    if isinstance(found, Budget):
        return found
    if text not in PRESETS:
        raise InputsInvalid(f"got {text!r}, wanted one of {', '.join(PRESETS)}, a speedup such as 2, or transformer_flops=0.4")
    return Budget(error=PRESETS[text])


def by_name(paths: list[Path]) -> dict[str, Plan]:
    """Load plans, by the names of their files without the ending."""
    loaded = {path.stem: Plan.load(path) for path in paths}
    if len(loaded) < len(paths):
        raise InputsInvalid(f"got plans {[str(p) for p in paths]}, wanted files of different names: a row is named by its file")
    return loaded
