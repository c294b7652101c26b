"""A call of the transformer in a calibration run, and what is wrong with the calls of a step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from arrowhead.engine.loop_checks import Numbers
from arrowhead.errors import InputsInvalid
from arrowhead.plans.layout import Tokens

LEAVE_OUT = "leave out what changes the run on its way, such as a callback that ends guidance, or interrupts it"


@dataclass(frozen=True)
class TransformerCall:
    """A call of a transformer by the pipeline.

    `run` runs it. `latents` are (B, …), or a list with one for each image. `scales` says whether the call scales a LoRA. The
    pipeline goes on with the tokens `returned` of the output. `counted` is the scheduler's count of steps. `numbers` are those
    among the arguments.
    """

    transformer: nn.Module
    tokens: Tokens
    latents: Any
    run: Callable[[], Any]
    scales: bool
    returned: slice
    counted: int | None
    numbers: Numbers


def require_one_image(calls: Sequence[TransformerCall]) -> None:
    """Check that the calls of a step have the same image. Their texts may have two lengths.

    Raises:
        InputsInvalid: they have not.
    """
    first, other = calls[0].tokens, calls[-1].tokens
    if replace(other, text=first.text) != first:
        raise InputsInvalid(
            f"got {first} in one call of a step and {other} in the other, wanted the same image, and the text on the same side "
            "of it; bring both branches to one size"
        )


def call_missing() -> InputsInvalid:
    """The error of a step with one call of two."""
    return InputsInvalid(
        "got one call of the transformer in a step, wanted one for each CFG branch; where both come in one batch, say so: cfg "
        f"of the adapter; {LEAVE_OUT}"
    )
