"""Whether a bundled MMDiT draws what the prompt says: 200 prompts that it was trained on, and 200 that it was not.

    python benchmarks/recognition.py mmdit --data emoji64.npz --tools TOOLS
    python benchmarks/recognition.py mmdit32 --data emoji64.npz --tools TOOLS

A generated picture is compared, by LPIPS, with all training pictures of 50 names, the prompt's among them, in any style. It is
right when the nearest one bears the prompt's name; chance is 2 %. TOOLS is a folder with `perceptual.py`; see README.md.
Pictures are stored, so that the run can be interrupted.
"""

import importlib
import json
import random
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from shards import load_images, make_images
from torch import Tensor
from tqdm import tqdm

import arrowhead as ah
from arrowhead.versions import versions

HERE = Path(__file__).parent
PROMPTS, NAMES, STEPS, GUIDANCE, BATCH = 200, 50, 28, 4.0, 8
PRECISION = "medium"  # linear layers in bfloat16, which takes two thirds of the time


def pictures(pipe: Any, captions: list[str], work: Path) -> Tensor:
    """One picture for each caption, seed i for the i-th: (n, 3, H, W) in [0, 1]."""

    def make(start: int) -> Tensor:
        prompts = captions[start : start + BATCH]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(prompts))]
        return pipe(prompts, None, GUIDANCE, generators, STEPS, output_type="pt").images

    make_images(work, range(0, len(captions), BATCH), make)
    return load_images(work)


def rightly_named(made: Tensor, names: list[str], real: Tensor, real_names: list[str], distance: Any) -> float:
    """The share of pictures whose nearest real one, among those of 50 names, bears their own; both in [0, 1]."""
    draw, right = random.Random(0), 0
    others = sorted(set(real_names))
    for picture, name in zip(tqdm(made, desc="compare", mininterval=10), names, strict=True):
        among = {name, *draw.sample([other for other in others if other != name], NAMES - 1)}
        rows = [i for i, other in enumerate(real_names) if other in among]
        near = distance(picture.expand(len(rows), -1, -1, -1) * 2 - 1, real[rows] * 2 - 1)  # (rows,)
        right += real_names[rows[int(near.argmin())]] == name
    return right / len(made)


def named(emoji: Any, names: list[str], made: Tensor) -> float:
    """`rightly_named` among all training pictures of a data set, brought to the size of those that were made."""
    seen = list(emoji.seen)
    real = torch.from_numpy(emoji.images[seen]).permute(0, 3, 1, 2).float() / 255  # (n, 3, 64, 64)
    real = F.avg_pool2d(real, real.shape[-1] // made.shape[-1])
    return rightly_named(made, names, real, [emoji.names[i] for i in seen], importlib.import_module("perceptual").LPIPS())


def main(
    model: Annotated[str, typer.Argument(help="mmdit or mmdit32")],
    data: Annotated[Path, typer.Option(help="the emoji, as training/mmdit.py reads them")],
    tools: Annotated[Path, typer.Option(help="folder with perceptual.py")],
    work: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("checkpoints/recognition"),
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Generate, compare, and write results/MODEL_recognition.json."""
    sys.path[:0] = [str(tools), str(HERE.parent / "training")]
    captions = importlib.import_module("captions")
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(PRECISION)
    emoji, pipe = captions.Emoji.read(data), ah.tiny.load(model)
    seen = list(emoji.seen)
    groups = {
        "seen": random.Random(1).sample(seen, PROMPTS),
        "held out": random.Random(1).sample(sorted(emoji.held_out), PROMPTS),
    }
    result: dict[str, Any] = {}
    for group, chosen in groups.items():
        made = pictures(pipe, [emoji.caption(i) for i in chosen], work / model / group)
        result[group] = named(emoji, [emoji.names[i] for i in chosen], made)
        typer.echo(f"{group}: {result[group]:.1%}")
    setting = {"prompts": PROMPTS, "names": NAMES, "chance": 1 / NAMES, "steps": STEPS, "guidance": GUIDANCE, "side": pipe.side}
    about = {"date": datetime.now(UTC).date().isoformat(), "device": "cpu", "dtype": "float32", "matmuls": PRECISION}
    text = json.dumps({**about, "versions": versions(), **setting, "rightly_named": result}, indent=1)
    (HERE / f"results/{model}_recognition.json").write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
