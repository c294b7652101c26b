"""A pipeline's transformer with its family and its sites."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from arrowhead.errors import InputsInvalid
from arrowhead.models.custom import CustomModel, Forward
from arrowhead.models.family import Family
from arrowhead.plans.layout import Branches, BranchOrder, Site, Tokens, relevant_tokens
from arrowhead.plans.target import NO_SCHEDULER, Target, to_json_value
from arrowhead.upstream import uncompiled

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Model:
    """A pipeline's transformer, its family, and its sites with their modules in the order they run.

    Where a second transformer takes over in the middle, it has the same sites; `modules` are those of the first. A module of
    one's own with its adapter takes the places of pipeline and family; `forwards`, by path, are those that have to take the
    place of attention modules' own.
    """

    pipe: "DiffusionPipeline | CustomModel"
    transformers: tuple[nn.Module, ...]
    family: Family
    branch_order: BranchOrder
    modules: Mapping[Site, nn.Module]
    forwards: Mapping[str, Forward] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites in the order they run."""
        return tuple(self.modules)

    @property
    def transformer(self) -> nn.Module:
        """The one that runs first."""
        return self.transformers[0]

    @property
    def site_modules(self) -> list[tuple[Site, nn.Module]]:
        """The sites with their modules in every transformer."""
        both = ((site, transformer.get_submodule(site.path)) for transformer in self.transformers for site in self.sites)
        return [(site, uncompiled(module) if site.kind == "self_attention" else module) for site, module in both]

    @property
    def called(self) -> tuple[nn.Module, ...]:
        """The transformers as they are called: where torch.compile hides one, what hides it."""
        return called(self.pipe)

    @property
    def switch(self) -> int | None:
        """The step of the call that is running from which the second transformer is called; None where it never is."""
        takes_over = self.family.takes_over
        return None if takes_over is None or len(self.transformers) == 1 else takes_over(self.pipe)

    def transformer_at(self, step: int) -> nn.Module:
        """The transformer that is called in a step of the call that is running."""
        return self.transformers[self.switch is not None and step >= self.switch]

    @property
    def steps(self) -> int | None:
        """The denoising steps of the call that is running; one that starts from an image leaves the first ones out.

        None of a loop of one's own, which nobody knows before it ends.
        """
        if isinstance(self.pipe, CustomModel):
            return None
        return len(self.pipe.scheduler.timesteps) - (getattr(self.pipe.scheduler, "begin_index", None) or 0)

    @property
    def scheduler_step(self) -> int | None:
        """What the scheduler counts of the steps it made in the call that is running; None where it does not say."""
        return None if isinstance(self.pipe, CustomModel) else getattr(self.pipe.scheduler, "step_index", None)

    @property
    def latent_channels(self) -> int | None:
        """Channels that a sampler goes by, where the transformer gives a variance, too; None where it gives no more."""
        if isinstance(self.pipe, CustomModel):
            return self.pipe.adapter.latent_channels
        config: Any = self.transformer.config
        given = getattr(config, "out_channels", None)
        return int(config.in_channels) if given == 2 * config.in_channels else None

    def only(self, wanted: Callable[[Site], bool]) -> "Model":
        """The same with fewer sites."""
        return replace(self, modules={site: module for site, module in self.modules.items() if wanted(site)})

    def without_overlap(self, sites: Collection[Site]) -> "Model":
        """The same without what a plan for these sites cannot speak of: blocks around them, and what is within its blocks."""

        def apart(site: Site) -> bool:
            return not any(other.contains(site) or site.contains(other) for other in sites)

        return self.only(apart)

    def call_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The pipeline call's arguments by name, defaults included.

        Raises:
            InputsInvalid: the pipeline's call does not take them.
        """
        name = type(self.pipe).__name__
        return _by_name(inspect.signature(self.pipe.__call__), args, kwargs, name)

    def transformer_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The transformer call's arguments by name, defaults included, as the family's class names them."""
        known: Any = next(c for c in type(self.transformer).__mro__ if c.__name__ == self.family.transformer)
        return _by_name(inspect.signature(known.forward), (self.transformer, *args), kwargs, "the transformer")

    def latents_argument(self, arguments: Mapping[str, Any]) -> Any:
        """What the transformer works on, (B, …) or a list, of a call with these `transformer_arguments`."""
        named = self.family.samples
        return arguments[named] if named in arguments else [*arguments.values()][1]  # beside itself

    def tokens(self, arguments: Mapping[str, Any]) -> Tokens:
        """What a call of the transformer with these `transformer_arguments` brings that matters to the sites."""
        return relevant_tokens(self.family.tokens(self.transformer, arguments), self.sites)

    def guidance_scale(self, call: Mapping[str, Any], step: int) -> float:
        """How far a pipeline call with these arguments, which is running, drives the branches apart in a step."""
        later = self.family.later_guidance_scale
        scale = self.family.guidance_scale if later is None or self.transformer_at(step) is self.transformer else later
        return scale(call)

    def branches(self, call: Mapping[str, Any]) -> Branches:
        """How the CFG branches of a pipeline call with these arguments arrive.

        Raises:
            InputsInvalid: the call asks for what cannot be compressed.
        """
        if refused := self.family.refused(call):
            raise InputsInvalid(f"got {refused}; wanted a call without it; leave it out, or remove the plan")
        try:
            guided = self.family.guided(dict(getattr(self.pipe, "config", {})) | dict(call))
        except (TypeError, ValueError) as error:
            raise InputsInvalid(
                f"got guidance that is no number ({error}); wanted one; correct the call's arguments"
            ) from error
        return Branches(self.branch_order, guided)


def transformers_of(pipe: "DiffusionPipeline") -> tuple[Any, ...]:
    """A pipeline's transformers, in the order they are called, as they are where torch.compile hides them."""
    return tuple(map(uncompiled, called(pipe)))


def called(pipe: "DiffusionPipeline | CustomModel") -> tuple[Any, ...]:
    """A pipeline's transformers, in the order they are called."""
    both = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    return tuple(transformer for transformer in both if isinstance(transformer, nn.Module))


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], callee: str) -> dict[str, Any]:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputsInvalid(f"{callee} cannot be called so: {error}; wanted {signature}") from error
    bound.apply_defaults()
    return dict(bound.arguments)


def target_of(model: Model) -> Target:
    """What a plan for this pipeline is bound to: transformer class, scheduler with its settings, sites."""
    if isinstance(model.pipe, CustomModel):
        return Target(model.family.transformer, NO_SCHEDULER, {}, model.sites)
    scheduler = model.pipe.scheduler
    # as JSON holds it, and without what diffusers adds of its own
    config = {name: to_json_value(value) for name, value in scheduler.config.items() if not name.startswith("_")}
    return Target(model.family.transformer, type(scheduler).__name__, config, model.sites)
