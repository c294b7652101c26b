"""Put the EMA weights of a training run into the package.

python training/bundle.py checkpoints/dit/state.pt
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import DPMSolverMultistepScheduler
from diffusers.training_utils import EMAModel
from dit import HERE, Config, build

from arrowhead.tiny.pipeline import TinyDiTPipeline


def main(
    state: Annotated[Path, typer.Argument(help="a checkpoint that training/dit.py wrote")],
    config: Annotated[Path, typer.Option(help="the configuration it was trained with")] = HERE / "dit.json",
    out: Annotated[Path, typer.Option(help="the package's folder")] = HERE.parent / "src/arrowhead/tiny/dit",
) -> None:
    """Write the pipeline in half precision, with the solver that every table uses."""
    model = build(Config(**json.loads(config.read_text())))
    saved = torch.load(state, weights_only=True)
    ema = EMAModel(model.parameters())
    ema.load_state_dict(saved["ema"])
    ema.copy_to(model.parameters())
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, final_sigmas_type="zero"
    )
    TinyDiTPipeline(model.half(), scheduler).save_pretrained(out)
    typer.echo(f"{out}: step {saved['step']}")


if __name__ == "__main__":
    typer.run(main)
