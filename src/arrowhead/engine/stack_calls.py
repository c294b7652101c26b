"""Calls of the blocks of a stack: all blocks of a transformer, one after another, as one site.

In a step that computes, every block runs. In a step that reuses, no block runs: each hands on what it got, and the last one
gives the first one's input with the stored output added. So whatever a model does between blocks, such as adding a ControlNet's
residuals, is part of the output.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from arrowhead.engine.attention_hook import AttentionHandler
from arrowhead.engine.cache import Output
from arrowhead.engine.execute_site import execute_site
from arrowhead.engine.generation import Generation
from arrowhead.engine.site_calls import BlockCall
from arrowhead.engine.site_plan import ReusePlan, SitePlan
from arrowhead.errors import NotIntercepted


@dataclass
class StackMember:
    """One block of a stack: its place among all `count` blocks, and the form of its output, known once it ran.

    `pair`: the block gives (text, image), of which `text` says whether the text is there.
    """

    place: int
    count: int
    pair: bool | None = None
    text: bool = True

    @property
    def last(self) -> bool:
        """Whether the stack ends with this block."""
        return self.place == self.count - 1


@dataclass
class StackPass:
    """One pass through a stack: the visual tokens that its first block got, (B, V, C), and the number of blocks passed.

    The tokens are all of the sequence where the first block already has text and visual tokens in one sequence.
    """

    began: Tensor
    passed: int = 0


@dataclass(slots=True)
class StackCall(BlockCall):
    """One call of a block of a stack; `site` is the stack. The last block's call stands for the whole stack."""

    member: StackMember
    began: Tensor | None = None
    visual: slice | None = None

    def storable(self, out: Output, rows: slice | None = None) -> Output:
        """What the stack added to the visual tokens of its input; on the last block's device, if blocks are on several."""
        assert self.began is not None
        began = self.began if rows is None else self.began[rows]
        visual = self._visual(_image(out), began)
        return visual - began.to(visual.device)

    def restore(self, stored: Output) -> Output:
        """The last block's output, with this added to the input of the first."""
        assert self.began is not None
        assert isinstance(stored, Tensor)
        image = self._argument(self.parameters[0], None).to(stored.device)
        return self._in_form(self._with_visual(image, self.began.to(stored.device) + stored))

    def run(
        self,
        answer: AttentionHandler | None = None,  # noqa: ARG002
        rows: slice | None = None,  # noqa: ARG002
        heads: Sequence[int] | None = None,  # noqa: ARG002
    ) -> Output:
        """Run the block, for all rows: a stack has no heads, and does not share."""
        out = self.original(*self.args, **self.kwargs)
        self.member.pair = isinstance(out, tuple)
        self.member.text = isinstance(out, tuple) and out[0] is not None
        return out

    def handed_on(self) -> Output:
        """The input in the form of an output."""
        return self._in_form(self._argument(self.parameters[0], None))

    @property
    def image(self) -> Tensor:
        """The visual tokens that the block gets, with the text where it is in the same sequence: (B, N, C)."""
        return self._argument(self.parameters[0], None)

    def _in_form(self, image: Tensor) -> Output:
        if self.member.pair is None:
            raise NotIntercepted(
                f"{self.site.path}: got a step that skips blocks before any ran; wanted the first step computed"
            )
        if not self.member.pair:
            return image
        return self._argument("encoder_hidden_states", None) if self.member.text else None, image

    def _visual(self, tokens: Tensor, began: Tensor) -> Tensor:
        """The tokens of a block's output that the first block's input had."""
        if tokens.shape[1] == began.shape[1]:
            return tokens
        assert self.visual is not None
        part = tokens[:, self.visual]
        if part.shape[1] != began.shape[1]:
            raise NotIntercepted(
                f"{self.site.path}: got {tokens.shape[1]} tokens at the end of the blocks and {began.shape[1]} at their "
                "beginning, wanted as many, or the text's more; search again without stacks"
            )
        return part

    def _with_visual(self, tokens: Tensor, visual: Tensor) -> Tensor:
        """The tokens with these visual ones."""
        if tokens.shape[1] == visual.shape[1]:
            return visual
        out = tokens.clone()
        self._visual(out, visual).copy_(visual)
        return out


def _image(out: Output) -> Tensor:
    """The image's tokens of a block's output: (text, image), or the image alone."""
    image = out[1] if isinstance(out, tuple) else out
    assert image is not None
    return image


def execute_stack(call: StackCall, plan: SitePlan, generation: Generation) -> Output:
    """The output of one block of a stack in this step.

    Raises:
        NotIntercepted: blocks were skipped, or called in another order, by something else.
        PlanMismatch: the batch is another one than in the steps before.
    """
    passes, path, member = generation.stack_passes, call.site.path, call.member
    if member.place == 0:
        passes[path] = StackPass(call.image)
    running = passes.get(path)
    if running is None or running.passed != member.place:
        raise NotIntercepted(
            f"{path}: got block {member.place} after {running.passed if running else 0} blocks, wanted all blocks in order; "
            "something else skips blocks: take it off, or remove the plan"
        )
    running.passed += 1
    if not member.last:
        return call.handed_on() if isinstance(plan, ReusePlan) else call.run()
    del passes[path]
    if isinstance(plan, ReusePlan):
        for count in plan.inner:
            generation.stats.record_pass(count)
    call.began, call.visual = running.began, generation.tokens.visual_slice
    return execute_site(call, plan, generation)


def members_of(count: int) -> Sequence[StackMember]:
    """The members of a stack of so many blocks."""
    return [StackMember(place, count) for place in range(count)]
