"""What one watched generation learnt: a `Profile`, from which a plan for any budget is solved without the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from arrowhead.plans.layout import Branches, Tokens
from arrowhead.plans.target import Target
from arrowhead.searches.stack.profile_file import read_profile, write_profile

AGES = 16
"""How many steps old what a step reads may be."""
SKETCH = 1024
"""Numbers that stand for a change of the guided output."""


@dataclass(frozen=True)
class Profile:
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

    def save(self, path: str | Path) -> None:
        """Write the profile to a file: safetensors in 16 bits, with everything but the tensor as JSON in its header.

        Raises:
            InputsInvalid: `about` is none that `load` reads.
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
