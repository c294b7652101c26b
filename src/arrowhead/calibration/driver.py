"""The driver: how a pipeline, or a loop around a custom model, generates once with the inputs that a search was given.

`driver_of` makes one of the caller's arguments. A search, a calibration and a check are given the driver alone, and do not ask
whether a pipeline or a loop is behind it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from arrowhead.calibration.isolation import exclusive_call, hide_progress_bar, preserve_rng
from arrowhead.calibration.outputs import stacked
from arrowhead.calibration.scheduler_calls import LoopEnded, end_with_first_loop, observe
from arrowhead.calibration.sharding import ALONE, Share, one_by_one, share_out
from arrowhead.engine.changes import Changes
from arrowhead.engine.compile_boundary import run_eagerly
from arrowhead.errors import InputsInvalid
from arrowhead.models.custom import Adapter, CustomModel, with_adapter
from arrowhead.models.model import Model, transformers_of
from arrowhead.plans.target import to_json_value
from arrowhead.upstream import execution_device, name_or_path


class Driver(ABC):
    """Generates once, as often as it is asked to, with the same inputs and the same random numbers.

    Attributes:
        pipe: the pipeline, or the custom model with its adapter, as `find` and `apply` take it.
        share: this process's part of the images, of those of all processes.
        wants_result: whether what the call gives is used, so that it has to run to its end.
    """

    wants_result = False

    def __init__(self, pipe: Any, share: Share = ALONE) -> None:
        self.pipe, self.share = pipe, share

    @property
    @abstractmethod
    def scheduler(self) -> Any:
        """The scheduler that the run steps with; None for a loop, whose sampler is not known."""

    @abstractmethod
    def call_arguments(self, model: Model) -> dict[str, Any]:
        """The pipeline call's arguments by name, defaults included; empty for a loop, whose adapter says how it is guided.

        Raises:
            InputsInvalid: the pipeline's call does not take the inputs.
        """

    @abstractmethod
    def prepare(self, changes: Changes) -> Callable[[], Any]:
        """Returns a function that generates once, and gives what the pipeline's call or the loop gives.

        Until the changes are undone nothing compiled runs. Then the pipeline, the generators among the inputs and torch's
        random states are as before, but for the scheduler's timesteps, which every call of a pipeline sets.
        """

    def one_by_one(self) -> "list[Driver]":
        """Drivers of one prompt each.

        Raises:
            InputsInvalid: the prompts cannot be told apart, or are split among processes.
        """
        raise InputsInvalid("got prompts to run one after another in a loop around a custom model, wanted all at once")

    @abstractmethod
    def final_latents(self) -> Tensor:
        """Generate once; gives the final latents of all processes' images, float32."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """What is driven and its inputs, those of all processes, as JSON holds them."""


class PipelineDriver(Driver):
    """Drives a diffusers pipeline with keyword arguments of its call."""

    def __init__(
        self, pipe: Any, inputs: Mapping[str, Any], share: Share = ALONE, all_inputs: Mapping[str, Any] | None = None
    ) -> None:
        """`inputs` are this process's arguments, `all_inputs` those of all processes, None where these are the same."""
        super().__init__(pipe, share)
        self._inputs, self._all_inputs = inputs, inputs if all_inputs is None else all_inputs

    @property
    def scheduler(self) -> Any:
        """The pipeline's."""
        return self.pipe.scheduler

    def call_arguments(self, model: Model) -> dict[str, Any]:
        """As the signature of the pipeline's call names them."""
        return model.call_arguments((), self._inputs)

    def prepare(self, changes: Changes) -> Callable[[], Any]:
        """No progress bar is shown, and any other call of the pipeline is refused, with AlreadyGenerating."""
        pipe, generator = self.pipe, self._inputs.get("generator")
        preserve_rng(generator, execution_device(pipe), changes)
        call = exclusive_call(pipe, changes)
        hide_progress_bar(pipe, changes)
        run_eagerly(changes)
        return lambda: call(**self._inputs)

    def one_by_one(self) -> list[Driver]:
        """Each with its entries of the arguments that have one for each prompt."""
        if not self.share.alone:
            raise InputsInvalid("got prompts to run one after another with shard, wanted one of the two; leave either out")
        return [PipelineDriver(self.pipe, own, share, self._all_inputs) for own, share in one_by_one(self._inputs)]

    def final_latents(self) -> Tensor:
        """What the scheduler's last step gives, (B, C, …) or (B, N, C). A call of several loops ends with the first one.

        Raises:
            NotIntercepted: the pipeline never called its scheduler.
        """
        changes = Changes()
        with changes, changes:
            calls = observe(self.scheduler, changes)
            end_with_first_loop(self.scheduler, calls, changes)
            generate = self.prepare(changes)
            with suppress(LoopEnded):
                generate()
        return self.share.joined(calls.latents())

    def described(self) -> dict[str, Any]:
        """With the seeds that the generators began with."""
        transformer, *_ = transformers_of(self.pipe)
        generator = self._all_inputs.get("generator")
        generators = [generator] if isinstance(generator, torch.Generator) else generator or []
        return {
            "pipeline": type(self.pipe).__name__,
            "model": name_or_path(self.pipe),
            "inputs": {name: _described(value) for name, value in self._all_inputs.items() if name != "generator"},
            "seeds": [g.initial_seed() for g in generators],
            "device": str(transformer.device),
            "dtype": str(transformer.dtype),
        }


class LoopDriver(Driver):
    """Drives a loop around a custom model, by a callable that generates once."""

    def __init__(self, pipe: CustomModel, generate: Callable[[], Any]) -> None:
        super().__init__(pipe)
        self._generate = generate

    @property
    def scheduler(self) -> None:
        """A loop's sampler is not known."""
        return

    def call_arguments(self, model: Model) -> dict[str, Any]:  # noqa: ARG002
        """There are none."""
        return {}

    def prepare(self, changes: Changes) -> Callable[[], Any]:
        """The loop may be called from elsewhere meanwhile, but not the model, see `CalibrationRun`."""
        preserve_rng(None, self._weight.device, changes)
        run_eagerly(changes)
        return lambda: self.pipe(self._generate)

    def final_latents(self) -> Tensor:
        """What the callable returns, (B, C, …).

        Raises:
            InputsInvalid: the callable returns no tensor.
        """
        changes = Changes()
        with changes, changes:
            return latents_of_loop(self.prepare(changes)())

    def described(self) -> dict[str, Any]:
        """With the callable's name."""
        (transformer,) = transformers_of(self.pipe)
        return {
            "pipeline": type(transformer).__name__,
            "model": "",
            "inputs": {"generate": _described(self._generate)},
            "seeds": [],
            "device": str(self._weight.device),
            "dtype": str(self._weight.dtype),
        }

    @property
    def _weight(self) -> Tensor:
        return next(self.pipe.transformer.parameters())


def driver_of(pipe: Any, inputs: Any, adapter: Adapter | None = None, shard: Sequence[str] | None = None) -> Driver:
    """The driver for the arguments of `arrowhead.search`, or of another function that generates.

    Args:
        pipe: a diffusers pipeline, or a `torch.nn.Module` with its `adapter`.
        inputs: the keyword arguments of the pipeline's call; for a module a callable that generates once.
        adapter: describes a module.
        shard: names of the inputs to be split among the processes, see `share_out`; None: nothing is split.

    Raises:
        UnsupportedPipeline: a module comes without an adapter, or an adapter without a module.
        InputsInvalid: the inputs are of the other kind, or cannot be split.
    """
    pipe = with_adapter(pipe, adapter)
    if isinstance(pipe, CustomModel):
        if not callable(inputs):
            raise _unfit(inputs, "a callable that generates once, such as lambda: sample(model)")
        if shard is not None:
            raise InputsInvalid(
                f"got shard={shard!r} for a {type(pipe.transformer).__name__}; a callable that generates cannot be split; "
                "wanted none; leave shard out"
            )
        return LoopDriver(pipe, inputs)
    if callable(inputs):
        raise _unfit(inputs, "a mapping of the pipeline call's keyword arguments")
    if not isinstance(inputs, Mapping) or not all(isinstance(name, str) for name in inputs):
        raise InputsInvalid(f"got inputs {inputs!r:.200}, wanted a mapping of the pipeline call's keyword arguments")
    if shard is None:
        return PipelineDriver(pipe, inputs)
    return PipelineDriver(pipe, *share_out(inputs, shard), inputs)


def _unfit(inputs: Any, wanted: str) -> InputsInvalid:
    return InputsInvalid(f"got inputs of type {type(inputs).__name__}, wanted {wanted}")


def latents_of_loop(result: Any) -> Tensor:
    """The final latents (B, C, …) that a callable returned, float32; a list of them, one for each image, is stacked.

    Raises:
        InputsInvalid: the callable returned no tensor, and no list of tensors of one shape.
    """
    if not isinstance(result, Tensor | list):
        raise InputsInvalid(
            f"got a {type(result).__name__} from the callable that generates, wanted the final latents, a tensor (B, C, …) or "
            "a list: a budget goes by them"
        )
    return stacked(result).detach().float()


def _described(value: Any) -> Any:
    """An input as JSON holds it: a callable by its name, a tensor by its shape."""
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else to_json_value(value)
