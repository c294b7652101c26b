"""How the blocks of a custom model are described, which a plan may reuse whole."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from arrowhead.errors import InputsInvalid, UnsupportedPipeline
from arrowhead.models.family import NONE

Name = str | int
"""An argument of a call, by name or by position."""


@dataclass(frozen=True)
class Block:
    r"""One kind of block in a custom model: what a reuse of the whole block repeats, and what its FLOPs follow from.

    A block gives (B, N, C), or a tuple of such tensors or None. Each output continues an input: what is stored, and repeated
    in a step that reuses the block, is what the block added to it.

    Args:
        inputs: for each output, the argument of the block's call that it continues: a name, or a position. One of them where
            the block gives one tensor.
        joint: whether the outputs hold text tokens besides the visual ones; or `joint(module)`, where blocks differ.
        text: a regular expression for the paths, within the block, of linear layers that multiply the text tokens alone.
        per_sample: those of linear layers that run once for a sample, such as modulation.

    All other linear layers outside of the block's sites multiply the visual tokens, and, where `joint`, the text tokens, too.

    Raises:
        InputsInvalid: an argument is none of these.

    The blocks of FLUX's own source with two streams, which are called as `block(img=img, txt=txt, vec=vec, pe=pe)`:

    >>> Block(inputs=("img", "txt"), joint=True, text=r"txt_(attn|mlp)\..*", per_sample=r".*_mod\..*").joint
    True
    """

    inputs: Name | Sequence[Name] = 0
    joint: bool | Callable[[nn.Module], bool] = False
    text: str = NONE
    per_sample: str = NONE

    def __post_init__(self) -> None:
        names = self.names
        if not names or not all(isinstance(name, str) or (type(name) is int and name >= 0) for name in names):
            raise InputsInvalid(f"got inputs={self.inputs!r:.200}, wanted names or positions of arguments, one for each output")
        if not (isinstance(self.joint, bool) or callable(self.joint)):
            raise InputsInvalid(f"got joint={self.joint!r:.200}, wanted True, False, or joint(module)")
        for pattern in (self.text, self.per_sample):
            require_pattern(pattern)

    @property
    def names(self) -> tuple[Name, ...]:
        """The arguments that the outputs continue."""
        return (self.inputs,) if isinstance(self.inputs, str | int) else tuple(self.inputs)

    def gives_text(self, path: str, module: nn.Module) -> bool:
        """Whether a block's outputs hold text tokens.

        Raises:
            UnsupportedPipeline: `joint` says neither.
        """
        found = self.joint(module) if callable(self.joint) else self.joint
        if not isinstance(found, bool):
            raise UnsupportedPipeline(
                f"{path}: got {found!r:.200} from joint(module) of an arrowhead.Block, wanted True or False"
            )
        return found


def require_pattern(pattern: Any) -> None:
    """Check that a regular expression is one.

    Raises:
        InputsInvalid: it is none.
    """
    try:
        if isinstance(pattern, str) and re.compile(pattern):
            return
        why = "no text"
    except (re.error, OverflowError, RecursionError) as error:
        why = str(error)
    raise InputsInvalid(f"got the pattern {pattern!r:.200} ({why}), wanted a regular expression for paths of modules")
