"""Gradients of the guided output with respect to the sites' outputs: by backpropagation, or stand-ins weighted by trials."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from arrowhead.calibration.sharding import Share
from arrowhead.calibration.step import Step
from arrowhead.engine.attention_hook import AttentionCall
from arrowhead.engine.cache import Output
from arrowhead.engine.generation import Generation
from arrowhead.engine.site_calls import SiteCall
from arrowhead.errors import InputsInvalid
from arrowhead.plans.layout import Site
from arrowhead.searches.budget.sensitivity.cfg import Guidance
from arrowhead.searches.budget.sensitivity.probes import LEAST, SiteProbes
from arrowhead.searches.budget.sensitivity.site_history import (
    SiteHistory,
    add_to_module,
    count_full_pass,
    run_with_added,
)

Gradients = Mapping[str, Tensor]
"""For each site's path the gradient at the output of its heads, (B, H, N, D)."""


class GradientSource(Protocol):
    """Runs the steps of a calibration run, records them in a history, and gives gradients."""

    images: int
    """How many images this process generates; 0 before the first step."""

    def gradients(self, step: Step, guidance: Guidance, generator: torch.Generator) -> Iterator[Gradients]:
        """Run the pipeline's step, and give the gradients of r·(guided output) for each random vector r."""

    def weights(self, steps: int) -> Tensor:
        """Factors for the products of each step and head, (S, H), once all steps have run."""


class Backpropagation:
    """One pass forward in each step, and one back for each random vector."""

    def __init__(self, history: SiteHistory, share: Share, vectors: int) -> None:
        self.images = 0
        self._history, self._share, self._vectors = history, share, vectors

    def gradients(self, step: Step, guidance: Guidance, generator: torch.Generator) -> Iterator[Gradients]:
        """See `GradientSource`. The graph is there until the last vector's gradients have been taken."""
        added: dict[str, Tensor] = {}  # zeros that are added to what sites give, for gradients to come back to
        with ExitStack() as graph:
            with self._history.flops.counted():
                outputs = graph.enter_context(step.traced(partial(self._at_site, added)))
            self._history.sites = step.sites  # in the order in which they run, which is known from the first step on
            guided = _guided(guidance, [output.detach() for output in outputs])
            self.images = len(guided)
            for i in range(self._vectors):
                of_all = torch.randn(self._share.of_all(self.images), *guided.shape[1:], generator=generator)
                vector = self._share.own(of_all).to(guided.device, guided.dtype)
                cotangents = guidance.cotangents(outputs, vector)
                keep = i < self._vectors - 1
                found = torch.autograd.grad(outputs, list(added.values()), cotangents, retain_graph=keep)
                of_path = dict(zip(added, found, strict=True))
                yield {site.path: self._history.by_sample(of_path[site.path], site) for site in self._history.sites}

    def weights(self, steps: int) -> Tensor:
        """1: the gradients are exact."""
        return torch.ones(steps, sum(site.heads for site in self._history.sites), dtype=torch.float64)

    def _at_site(self, added: dict[str, Tensor], call: SiteCall, state: Generation) -> Output:
        """Run and record a site, with zeros added. A site of a checkpointed block runs again on the way back, unrecorded."""
        site = call.site
        if site.path in added:
            return run_with_added(call, added[site.path])
        if site.kind != "self_attention":
            out, recorded = self._history.record_module(call, state)
            added[site.path] = _zeros_like(recorded)
            return add_to_module(out, added[site.path])
        attention = self._history.recording_attention(call, state)

        def with_zeros(asked: AttentionCall) -> Tensor:
            out = attention(asked)
            added[site.path] = _zeros_like(out)
            return out + added[site.path]

        return call.run(with_zeros)


def _zeros_like(tensor: Tensor) -> Tensor:
    """Zeros to take gradients with respect to, which take the memory of one."""
    return tensor.new_zeros(()).expand(tensor.shape).requires_grad_()


class Trials:
    """No gradients: a random vector stands for each, weighted by how much a change of the site was seen to change the output.

    A vector's length is that of the guided output over that of the site's. The weight is one number for each step and site, and
    is fitted to trials: passes in which each image has one site changed to what it gave in the step before.
    """

    def __init__(self, history: SiteHistory, vectors: int) -> None:
        self.images = 0
        self._history, self._vectors, self._probes = history, vectors, SiteProbes(len(history.sites))

    def gradients(self, step: Step, guidance: Guidance, generator: torch.Generator) -> Iterator[Gradients]:
        """See `GradientSource`."""
        with self._history.flops.counted():
            outputs = step.finish_by(self._history.record)
        self._history.sites = step.sites  # in the order in which they run, which is known from the first step on
        guided = _guided(guidance, outputs).float()
        self.images = len(guided)
        for _ in range(0 if step.first else math.ceil(LEAST / self.images)):  # a first step has none before it
            self._try(step, guidance, guided)
        for _ in range(self._vectors):
            yield {site.path: self._stand_in(site, guidance, guided, generator) for site in self._history.sites}

    def weights(self, steps: int) -> Tensor:
        """The fitted weights."""
        heads = torch.tensor([site.heads for site in self._history.sites])
        return self._probes.fitted(steps).repeat_interleave(heads, 1)

    def _try(self, step: Step, guidance: Guidance, guided: Tensor) -> None:
        """Run the step once more, with one site of each image changed, and note how much the output (B, …) changes."""
        chosen = self._probes.chosen(self.images)
        changed = guidance.guided(step.tried(partial(self._changed, chosen, guidance))).float()
        for image, place in enumerate(chosen):
            now, change = self._of_image(self._history.sites[place], guidance, image)
            if change is not None:
                response = (changed[image] - guided[image]).norm() / guided[image].norm()
                self._probes.note(step.index, place, float(response / (change.norm() / now.norm())))

    def _changed(self, chosen: Sequence[int], guidance: Guidance, call: SiteCall, state: Generation) -> Output:
        """Run a site with what it gave in the step before, for those images for which this site was chosen."""
        site, steps = call.site, self._history.steps_of(call.site)
        count_full_pass(call, state)
        images = [image for image, place in enumerate(chosen) if self._history.sites[place] == site]
        if not images or len(steps) < 2:
            return call.native()
        change = torch.zeros_like(steps[0].output)
        difference = steps[1].output - steps[0].output
        for rows, own in zip(guidance.halves(change), guidance.halves(difference), strict=True):
            if rows is not None and own is not None:
                rows[images] = own[images]
        return run_with_added(call, self._history.by_sequence(change, site))

    def _of_image(self, site: Site, guidance: Guidance, image: int) -> tuple[Tensor, Tensor | None]:
        """What a site gave one image, its branches guided, and how the step before differs; None where it does not."""
        last = islice(self._history.steps_of(site), 2)
        now, *before = (_at_site(guidance).guided([step.output.flatten(2).float()])[image] for step in last)
        change = before[0] - now if before else None
        return now, change if change is not None and change.any() else None

    def _stand_in(self, site: Site, guidance: Guidance, guided: Tensor, generator: torch.Generator) -> Tensor:
        """A random vector for each image in place of the gradient, (B, H, N, D)."""
        output = self._history.steps_of(site)[0].output
        out = output.flatten(2).float()  # (B, H, N·D)
        own = _at_site(guidance).guided([out])
        length = guided.flatten(1).norm(dim=1) / own.flatten(1).norm(dim=1).clamp_min(1e-12)
        vector = torch.randn(own.shape, generator=generator).to(own.device) * length[:, None, None]
        (cotangent,) = _at_site(guidance).cotangents([out], vector)
        return cotangent.view_as(output)


def _at_site(guidance: Guidance) -> Guidance:
    """The guidance of what sites give, which has heads where the model's output has channels."""
    return replace(guidance, channels=None)


def _guided(guidance: Guidance, outputs: Sequence[Tensor]) -> Tensor:
    """The guided output.

    Raises:
        InputsInvalid: the model's output has fewer channels than the latents are said to have.
    """
    channels, given = guidance.channels, outputs[0].shape
    if channels is not None and channels > given[1]:
        raise InputsInvalid(
            f"got an output of shape {tuple(given)} with latent_channels={channels}, wanted {given[1]} of its channels at "
            "most; or None for all"
        )
    return guidance.guided(outputs)
