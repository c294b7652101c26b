"""Writes the EMA weights of a training run into the package, in half precision.

python training/bundle.py dit checkpoints/dit/state.pt
python training/bundle.py mmdit checkpoints/mmdit/state.pt --data data/emoji64.npz
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import dit
import mmdit
import typer
from captions import Emoji, tokenizer
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from loop import Config, averaged

from arrowhead.tiny.pipeline import TinyDiTPipeline
from arrowhead.tiny.text_to_image import TinyMMDiTPipeline

HERE = Path(__file__).parent


class Model(StrEnum):
    """The bundled models."""

    DIT = "dit"
    MMDIT = "mmdit"


def main(
    model: Model,
    state: Annotated[Path, typer.Argument(help="a checkpoint of its training")],
    data: Annotated[Path | None, typer.Option(help="mmdit: what it was trained on, for the vocabulary")] = None,
    config: Annotated[Path | None, typer.Option(help="the configuration it was trained with")] = None,
    out: Annotated[Path | None, typer.Option(help="the package's folder")] = None,
) -> None:
    """Write the pipeline with the scheduler that every table uses."""
    settings = Config.read(config or HERE / f"{model}.json")
    out = out or HERE.parent / "src/arrowhead/tiny" / model
    if model is Model.DIT:
        transformer = dit.build(settings)
        step = averaged(transformer, state)
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, final_sigmas_type="zero"
        )
        TinyDiTPipeline(transformer.half(), scheduler).save_pretrained(out)
    else:
        if data is None:
            raise typer.BadParameter("got no data, wanted the emoji that the vocabulary is made of", param_hint="--data")
        both = mmdit.TextToImage(settings)
        step = averaged(both, state)
        words = tokenizer(mmdit.words(Emoji.read(data)))
        both.half()
        TinyMMDiTPipeline(
            both.transformer, FlowMatchEulerDiscreteScheduler(shift=1.0), both.text_encoder, words
        ).save_pretrained(out)
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)
    typer.echo(f"{out}: step {step}")


if __name__ == "__main__":
    typer.run(main)
