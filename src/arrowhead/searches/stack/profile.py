"""What one watched generation learnt: a `Profile`, from which a plan for any budget is solved without the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arrowhead.errors import InputsInvalid
from arrowhead.plans.card import Card
from arrowhead.plans.hub import OnHub
from arrowhead.plans.layout import Branches, Tokens
from arrowhead.plans.target import Target
from arrowhead.searches.stack.interpolated import ages_at, changes_at, parts_of, products_at, within_own
from arrowhead.searches.stack.profile_file import MAX_BYTES, read_profile, write_profile

AGES = 16
"""How many steps old what a step reads may be."""
SKETCH = 1024
"""Numbers that stand for a change of the guided output."""


@dataclass(frozen=True)
class Profile(OnHub):
    """What one plain generation showed of a model's stack of blocks. `arrowhead.profile` makes it, `arrowhead.solve` uses it.

    S steps. Let O_t be what the stack adds to its input in step t, and J_t the derivative of the guided output with respect to
    it, by the model's last layers. A sketch is a random projection that keeps norms, the same one for all changes.

    Attributes:
        target: the model that was watched; its one site is the stack.
        tokens: the tokens of a call of the transformer.
        branches: how its CFG branches come.
        changes: (S, ages + 1, branches, SKETCH), float32: the sketches of J_t·O_t for age 0, and of J_t·(O_{t−k} − O_t) for
            each age k; 0 for what is older than the run. Each CFG branch's part of the guided output has its own.
        products: (S, branches, ages + 1, ages + 1), float32: ⟨O_{t−k}, O_{t−l}⟩ for the ages k and l; 0 likewise.
        sampler_gains: (S,), the norm of the change of the final latents over that of an error in a step's guided output.
        model_feedback: (S,), the factor by which the model changes that in the steps that follow.
        final: the norm of the final latents of all images.
        flops: of the transformer in a step that computes, and in one that skips all blocks, per image, as torch counts them.
        seconds: of the transformer in a step that computes, and in one that skips all blocks.
        switch: the step from which on a second transformer computes; None for one transformer.
        about: the provenance: how the profile was made.

    Examples:
        >>> profile = ah.profile(pipe, inputs)
        >>> profile.save("flux.profile")
        >>> plan = ah.solve(ah.Profile.load("flux.profile"), ah.Budget(transformer_flops=0.4))
    """

    file_name = "profile.safetensors"
    most_bytes = MAX_BYTES
    target: Target
    tokens: Tokens
    branches: Branches
    changes: Tensor
    products: Tensor
    sampler_gains: tuple[float, ...]
    model_feedback: tuple[float, ...]
    final: float
    flops: tuple[float, float]
    seconds: tuple[float, float]
    switch: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def steps(self) -> int:
        """Denoising steps."""
        return len(self.sampler_gains)

    @property
    def ages(self) -> int:
        """How many steps old what a step reads may be."""
        return self.changes.shape[1] - 1

    @property
    def skipped_flops(self) -> float:
        """The part of a full step's FLOPs that a step takes in which all blocks are skipped."""
        return self.flops[1] / self.flops[0]

    @property
    def skipped_seconds(self) -> float:
        """The same part of its seconds."""
        return self.seconds[1] / self.seconds[0]

    def resample(self, steps: int | None = None, levels: Sequence[float] | None = None) -> "Profile":
        """The profile for other steps, by interpolation between those that were watched.

        Args:
            steps: the new number of steps, evenly among the watched ones; of two transformers each keeps its part.
            levels: in place of it, the noise level of each new step (see `Target.levels`), decreasing.

        Raises:
            InputsInvalid: not one of the two is given, there are no such levels, or one of two transformers has no step.

        Examples:
            >>> plan = ah.solve(profile.resample(steps=20), ah.Budget(transformer_flops=0.4))
        """
        watched = self.target.levels
        falls = levels is not None and len(levels) > 0 and min(levels) >= 0 and all(a > b for a, b in pairwise(levels))
        if (steps is None) == (levels is None) or (levels is not None and not (falls and watched)):
            raise InputsInvalid(
                f"got steps={steps!r} and {'no' if levels is None else len(levels)} levels, wanted one of them; levels decrease"
            )
        if steps is not None and (type(steps) is not int or steps < 1):
            raise InputsInvalid(f"got steps={steps!r}, wanted a whole number of at least 1")
        parts = parts_of(steps, levels, watched, self.steps, self.switch)
        if not all(parts):
            raise InputsInvalid(
                f"got steps={steps!r} and levels={levels!r}, wanted steps of both transformers; the second one "
                f"takes over in step {self.switch} of {self.steps}"
            )
        lengths = [end - begin for begin, end in pairwise([*(place for part in parts for place in part), float(self.steps)])]
        parts = within_own(parts, self.switch)
        places, ages = [place for part in parts for place in part], ages_at(parts, self.ages)
        gains, feedback = (np.interp(places, range(self.steps), known) for known in (self.sampler_gains, self.model_feedback))
        ends = [0, self.steps] if self.switch is None else [0, self.switch, self.steps]
        rows = [(slice(*own), [place - own[0] for place in part]) for own, part in zip(pairwise(ends), parts, strict=True)]
        return replace(
            self,
            target=replace(self.target, levels=None if levels is None else tuple(levels)),
            changes=torch.cat([changes_at(self.changes[own], part, ages) for own, part in rows]),
            products=torch.cat([products_at(self.products[own], part, ages) for own, part in rows]),
            sampler_gains=tuple((gains * lengths).tolist()),
            model_feedback=tuple(feedback.tolist()),
            switch=None if self.switch is None else len(parts[0]),
        )

    def save(self, path: str | Path) -> None:
        """Write the profile to a file: safetensors in 16 bits, with everything but the tensor as JSON in its header.

        Raises:
            InputsInvalid: `load` would not read `about`, or so many steps.
            FileUnwritable: the file cannot be written, or the disk is full. A file of this name is as it was then.
        """
        write_profile(path, self)

    @classmethod
    def load(cls, path: str | Path) -> "Profile":
        """Read a profile that `save` wrote.

        Raises:
            InputsInvalid: the file is no such profile, or contradicts itself.
        """
        return cls(**read_profile(path))

    def card(self, name: str) -> Card:
        """What the card of a repository that holds the profile says: what several budgets would cost, and what was watched."""
        from arrowhead.searches.stack.card import card_of  # noqa: PLC0415  # which imports this file

        return card_of(self, name)
