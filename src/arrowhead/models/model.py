"""A model that plans are put on: a pipeline, or a custom model, with its transformers, its family and its sites."""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from arrowhead.errors import InputsInvalid
from arrowhead.models.custom import CustomModel
from arrowhead.models.custom_attention import CalledFunction, Forward
from arrowhead.models.custom_blocks import Block
from arrowhead.models.family import Family
from arrowhead.models.signatures import method_signature
from arrowhead.models.sites import stack_blocks
from arrowhead.plans.layout import Branches, BranchOrder, Site, Tokens, relevant_tokens
from arrowhead.plans.target import NO_SCHEDULER, Target, to_json_value
from arrowhead.upstream import uncompiled

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Model:
    """A pipeline or custom model, with what a plan, a search and the engine ask of it.

    Attributes:
        pipe: the pipeline, or the custom model.
        transformers: its transformers, in the order they are called; where there are two, both have the same sites.
        family: the facts about the transformer's class.
        branch_order: the order of the CFG branches.
        modules: the sites with their modules in the first transformer, in the order they run.
        forwards: by the site's path, the forwards that replace those of a custom model's attention modules.
        functions: by the site's path, the functions that a custom model calls for attention in place of torch's.
        blocks: by the site's path, how the blocks of a custom model are called.
    """

    pipe: "DiffusionPipeline | CustomModel"
    transformers: tuple[nn.Module, ...]
    family: Family
    branch_order: BranchOrder
    modules: Mapping[Site, nn.Module]
    forwards: Mapping[str, Forward] = field(default_factory=dict)
    functions: Mapping[str, CalledFunction] = field(default_factory=dict)
    blocks: Mapping[str, Block] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites in the order they run."""
        return tuple(self.modules)

    @property
    def transformer(self) -> nn.Module:
        """The transformer that runs first."""
        return self.transformers[0]

    @property
    def site_modules(self) -> list[tuple[Site, nn.Module]]:
        """The sites of every transformer, but stacks, each with its module there."""
        found = (
            (site, transformer.get_submodule(site.module_path))
            for transformer in self.transformers
            for site in self.sites
            if site.kind != "stack"
        )
        return [(site, uncompiled(module) if site.kind == "self_attention" else module) for site, module in found]

    @property
    def stacks(self) -> list[tuple[Site, list[tuple[Site, nn.Module]]]]:
        """The stacks of every transformer, each with its blocks and their modules there, in the order they run."""
        found = []
        for transformer in self.transformers:
            for site in self.sites:
                if site.kind == "stack":
                    blocks, within = (
                        stack_blocks(site.path.split("+"), transformer),
                        {block.path: block for block in site.within},
                    )
                    found.append((site, [(within[path], module) for path, module in blocks.items()]))
        return found

    @property
    def called_transformers(self) -> tuple[nn.Module, ...]:
        """The modules that the pipeline calls: the transformers, or what torch.compile(transformer) gave for them."""
        return called_transformers(self.pipe)

    @property
    def switch(self) -> int | None:
        """The step of the running call from which the second transformer is called; None where it never is."""
        second_from = self.family.second_from
        return None if second_from is None or len(self.transformers) == 1 else second_from(self.pipe)

    def transformer_at(self, step: int) -> nn.Module:
        """The transformer that the running call uses in a step."""
        return self.transformers[self.switch is not None and step >= self.switch]

    @property
    def steps(self) -> int | None:
        """The denoising steps of the running call, without those that it leaves out because it starts from an image.

        None for a custom model: the length of its loop is not known before the loop ends.
        """
        scheduler = self.pipe.scheduler
        return None if scheduler is None else len(scheduler.timesteps) - self.timesteps_left_out

    @property
    def timesteps_left_out(self) -> int:
        """The scheduler's timesteps that the running call leaves out at the beginning, because it starts from an image.

        Pipelines from video to video do so without telling the scheduler.
        """
        begin = getattr(self.pipe.scheduler, "begin_index", None)
        timesteps = len(self.pipe.scheduler.timesteps)
        return begin if begin is not None else max(0, timesteps - getattr(self.pipe, "num_timesteps", timesteps))

    @property
    def timesteps(self) -> Any:
        """The scheduler's timesteps, a tensor that is a new one in each denoising loop; None where there is no scheduler."""
        return getattr(self.pipe.scheduler, "timesteps", None)

    @property
    def levels(self) -> tuple[float, ...] | None:
        """The noise levels of the steps of the latest call (see `Target.levels`); None where there is no scheduler."""
        scheduler = self.pipe.scheduler
        if (timesteps := self.timesteps) is None:
            return None
        whole = scheduler.config.get("num_train_timesteps", 1000)
        steps = torch.as_tensor(timesteps)[self.timesteps_left_out :].tolist()  # one read, as each waits for the device
        if min(steps, default=0) < 0:  # EDM's timesteps are logarithms of the noise
            sigmas = torch.as_tensor(scheduler.sigmas)[self.timesteps_left_out :][: len(steps)].tolist()
            return tuple(sigma / (1 + sigma) for sigma in sigmas)
        return tuple(step / whole for step in steps)

    @property
    def scheduler_step(self) -> int | None:
        """The scheduler's count of its steps in the running call; None where there is no scheduler, or no count."""
        return getattr(self.pipe.scheduler, "step_index", None)

    @property
    def latent_channels(self) -> int | None:
        """The channels of the output that a sampler uses, where a variance follows them; None where it uses all."""
        return self.family.latent_channels(self.transformer)

    def filtered(self, wanted: Callable[[Site], bool]) -> "Model":
        """The same model with the sites for which `wanted` is true."""
        return replace(self, modules={site: module for site, module in self.modules.items() if wanted(site)})

    def without_overlap(self, sites: Collection[Site]) -> "Model":
        """The same model without other sites that contain one of these, or lie within one."""
        paths = {site.path for site in sites}

        def separate(site: Site) -> bool:
            return site.path in paths or not any(other.contains(site) or site.contains(other) for other in sites)

        return self.filtered(separate)

    def call_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arguments of a call of the pipeline by name, defaults included.

        Raises:
            InputsInvalid: the pipeline's call does not take them.
        """
        signature, name = method_signature(type(self.pipe), "__call__"), type(self.pipe).__name__
        return dict([*_by_name(signature, (self.pipe, *args), kwargs, name).items()][1:])  # without the pipeline itself

    def transformer_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arguments of a call of the transformer by name, defaults included, with the transformer as the first.

        Raises:
            InputsInvalid: the transformer does not take them.
        """
        return self._forward_parameters.by_name((self.transformer, *args), kwargs)

    @cached_property
    def _forward_parameters(self) -> "_Parameters":
        """The parameters of the family's class: a subclass may take `*args`."""
        known: Any = next(cls for cls in type(self.transformer).__mro__ if cls.__name__ == self.family.transformer)
        return _Parameters(method_signature(known, "forward"), "the transformer")

    def require_signatures(self) -> None:
        """Check that the arguments of a call of the pipeline, and of the transformer, have names.

        Raises:
            UnsupportedPipeline: a wrapper hides them.
        """
        method_signature(type(self.pipe), "__call__")
        assert self._forward_parameters

    def latents(self, arguments: Mapping[str, Any]) -> Any:
        """The latents, (B, …) or a list of B, of a call of the transformer with these `transformer_arguments`."""
        name = self.family.latents_argument
        return arguments[name] if name in arguments else [*arguments.values()][1]  # the first argument is the transformer

    def tokens(self, arguments: Mapping[str, Any]) -> Tokens:
        """The tokens of a call of the transformer with these `transformer_arguments`, as far as the sites depend on them."""
        return relevant_tokens(self.family.tokens(self.transformer, arguments), self.sites)

    def guidance_scale(self, call: Mapping[str, Any], step: int) -> float:
        """The guidance scale in a step of a running pipeline call with these arguments."""
        second = self.family.second_guidance_scale
        scale = self.family.guidance_scale if second is None or self.transformer_at(step) is self.transformer else second
        return scale({"pipe": self.pipe, **call})

    def branches(self, call: Mapping[str, Any], *, follows: bool = False) -> Branches:
        """The CFG branches of a pipeline call with these arguments, at its beginning.

        `follows`: guidance that ends or begins on the way can be followed.

        Raises:
            InputsInvalid: the call has an option that no plan goes with, or a guidance scale that is no number.
        """
        call = {**getattr(self.pipe, "config", {}), "pipe": self.pipe, **call}
        if unsupported := self.family.unsupported_call(call) or (None if follows else self.family.guidance_changes(call)):
            raise InputsInvalid(f"got {unsupported}; wanted a call without it; leave it out, or remove the plan")
        try:
            guided = self.family.guided(call)
        except (TypeError, ValueError) as error:
            raise InputsInvalid(
                f"got guidance that is no number ({error}); wanted one; correct the call's arguments"
            ) from error
        return Branches(self.branch_order, guided)


def did_you_mean(given: Iterable[str], known: Collection[str]) -> str:
    """A hint at the known names that are most like the unknown ones among those given; empty where none is.

    >>> did_you_mean(["class_label", "seed"], ["class_labels", "guidance_scale"])
    ' (did you mean class_labels for class_label?)'
    """
    close = {name: get_close_matches(name, known, n=1) for name in given if name not in known}
    meant = [f"{match[0]} for {name}" for name, match in close.items() if match]
    return f" (did you mean {', '.join(meant)}?)" if meant else ""


def transformers_of(pipe: "DiffusionPipeline") -> tuple[Any, ...]:
    """A pipeline's transformers in the order they are called, without the wrappers of torch.compile."""
    return tuple(map(uncompiled, called_transformers(pipe)))


def called_transformers(pipe: "DiffusionPipeline | CustomModel") -> tuple[Any, ...]:
    """A pipeline's transformers in the order they are called, within the wrappers of torch.compile."""
    found = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    return tuple(transformer for transformer in found if isinstance(transformer, nn.Module))


def target_of(model: Model) -> Target:
    """What a plan for this model is bound to: the transformer's class, the scheduler with its settings, the sites."""
    scheduler = model.pipe.scheduler
    if scheduler is None:
        return Target(model.family.transformer, NO_SCHEDULER, {}, model.sites)
    # as JSON holds it, and without the entries that diffusers adds
    config = {name: to_json_value(value) for name, value in scheduler.config.items() if not name.startswith("_")}
    return Target(model.family.transformer, type(scheduler).__name__, config, model.sites)


class _Parameters:
    """The parameters of a function that is called many times, to name a call's arguments without binding its signature."""

    def __init__(self, signature: inspect.Signature, callee: str) -> None:
        parameters = signature.parameters.values()
        self._signature, self._callee = signature, callee
        self._names, self._known = tuple(signature.parameters), signature.parameters.keys()
        self._defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        self._plain = all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)

    def by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a call's arguments by name, defaults included, in the order of the parameters.

        Raises:
            InputsInvalid: the function does not take them.
        """
        named = dict(zip(self._names, args, strict=False))
        found = {**self._defaults, **named, **kwargs}
        once = len(args) <= len(self._names) and named.keys().isdisjoint(kwargs)
        if self._plain and once and found.keys() == self._known:
            return {name: found[name] for name in self._names}
        return _by_name(self._signature, args, kwargs, self._callee)  # which says what is wrong


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], callee: str) -> dict[str, Any]:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        meant = did_you_mean(kwargs, signature.parameters)
        raise InputsInvalid(f"{callee} cannot be called so: {error}{meant}; wanted {signature}") from error
    bound.apply_defaults()
    return dict(bound.arguments)
