"""A call of the transformer in a calibration run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from arrowhead.engine.loop_checks import Numbers
from arrowhead.plans.layout import Tokens


@dataclass(frozen=True)
class TransformerCall:
    """A call of a transformer by the pipeline.

    `run` runs it. `latents` are (B, …), or a list with one for each image. `scales` says whether the call scales a LoRA. The
    pipeline goes on with the tokens `returned` of the output. `counted` is the scheduler's count of steps.
    `numbers` are those among the arguments.
    """

    transformer: nn.Module
    tokens: Tokens
    latents: Any
    run: Callable[[], Any]
    scales: bool
    returned: slice
    counted: int | None
    numbers: Numbers
