"""The bytes that watching a generation holds, said before it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from arrowhead.calibration.driver import driver_of
from arrowhead.calibration.run import CalibrationRun
from arrowhead.models.find import find
from arrowhead.plans.cells import AST, FULL
from arrowhead.plans.layout import Branches, Site, Tokens
from arrowhead.plans.memory import memory
from arrowhead.searches.stack.watch import HELD

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


def profile_bytes(pipe: "DiffusionPipeline", inputs: Mapping[str, Any]) -> int:
    """Returns the bytes that `arrowhead.profile` holds at most from one step to the next, on the model's device.

    These are what the stack of blocks gave in the last 20 steps. The pipeline, the latents and what one pass of the transformer
    needs come on top. The pipeline runs up to its first call of the transformer.

    Raises what `arrowhead.profile` raises.

    Examples:
        >>> arrowhead.profile_bytes(pipe, {"prompt": "a cat", "num_inference_steps": 28}) / 2**20
    """
    driver = driver_of(pipe, inputs)
    model = find(driver.pipe, {"stack"})
    calibration = CalibrationRun(driver, model)
    calibration.run(lambda _: None, first_only=True)
    # weights may be kept in a smaller dtype than the one that computes
    dtype = getattr(model.transformer, "dtype", next(model.transformer.parameters()).dtype)
    steps, switch = calibration.step_count or HELD, calibration.switch
    longest = steps if switch is None else max(switch, steps - switch)  # of the steps of one transformer
    one = output_bytes(model.sites[0], calibration.tokens, calibration.branches, calibration.rows, dtype.itemsize)
    return one * min(longest, HELD)


def output_bytes(stack: Site, tokens: Tokens, branches: Branches, rows: int, itemsize: int) -> int:
    """The bytes of what a stack gives in one step, for `rows` samples in all calls of the step."""
    samples = 2 if branches.guided else 1
    cells = ((FULL,), (AST,))
    images = rows // samples
    return memory(cells, [stack], tokens, samples, images=images, itemsize=itemsize, calls=branches.calls).peak
