"""Watches one plain generation, and measures what skipping its steps would change: gives a `Profile`.

Where all blocks of a step are skipped, their changes add up: to extrapolate each block's output is to extrapolate the sum,
which is what the whole stack adds to its input. So that one tensor is watched, in every step. What an extrapolation from
earlier steps would change in the guided output is measured by the model's last layers alone.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from arrowhead.calibration.driver import Driver
from arrowhead.calibration.provenance import provenance
from arrowhead.calibration.run import CalibrationRun
from arrowhead.calibration.step import Step
from arrowhead.engine.cache import Output
from arrowhead.engine.generation import Generation
from arrowhead.engine.site_calls import SiteCall
from arrowhead.engine.stack_calls import StackCall
from arrowhead.errors import InputsInvalid
from arrowhead.models.find import find
from arrowhead.plans.cells import FULL
from arrowhead.plans.lifetimes import Writes
from arrowhead.searches.budget.sensitivity.cfg import Guidance
from arrowhead.searches.budget.sensitivity.outside_flops import flop_counter
from arrowhead.searches.budget.sensitivity.sampler_gain import run_scheduler
from arrowhead.searches.progress import clock
from arrowhead.searches.stack.profile import AGES, SKETCH, Profile

EVERY = 5
"""Changes are tried in one of this many steps: each is a pass of the last layers, 2 % of a whole pass on a small model."""
HELD = AGES + EVERY - 1
"""Outputs of the stack that are held, at most: those that a step is compared with, for the first of `EVERY` steps, too."""
NUDGE = 0.1
"""The part of a change of the stack's output that is tried, where the model computes in at least 32 bits: the last layers are
nearly linear for so small a change. In 16 bits the whole change is tried, because a small one would be lost in rounding."""


@dataclass(frozen=True)
class Watched:
    """The result of a watched generation: the profile, the final latents (B, C, …), and the seconds that watching took."""

    profile: Profile
    final: Tensor
    extra_seconds: float


def watch(driver: Driver, on_step: Callable[[int, int | None], None] = lambda *_: None, *, ages: int = AGES) -> Watched:
    """Generate once, in full, and call `on_step` with the step and the number of steps after each step.

    Held meanwhile: the stack's outputs of the last `ages` + `EVERY` − 1 steps. No gradient is taken.

    Raises:
        UnsupportedPipeline: the model is no plain chain of blocks.
        InputsInvalid: the run changes on its way, or an output is not finite.
    """
    model = find(driver.pipe, {"stack"})
    calibration = CalibrationRun(driver, model)
    recorder = _Recorder(calibration, model.latent_channels, ages)

    def follow(step: Step) -> None:
        recorder.follow(step)
        on_step(step.index, calibration.step_count)

    with torch.no_grad():
        replay = run_scheduler(driver, calibration, follow)
        images = recorder.images
        gains, feedback = replay.gains_and_feedback(len(recorder.changes), images)
    final = replay.latents()
    profile = Profile(
        target=calibration.target,
        tokens=calibration.tokens,
        branches=calibration.branches,
        changes=torch.stack(recorder.changes),
        products=torch.stack(recorder.products),
        sampler_gains=gains,
        model_feedback=feedback,
        final=float(final[:images].norm()),
        flops=(recorder.flops[0] / images, recorder.flops[1] / images),
        seconds=recorder.seconds(),
        switch=calibration.switch,
        about=provenance(driver, {"ages": ages}, "watched"),
    )
    return Watched(profile, final, recorder.extra_seconds)


class _StackAt:
    """What a site's calls are answered with in one pass: every block runs, or `put` stands for what the stack adds.

    `outputs` are those of each call: what the stack added to its input.
    """

    def __init__(self, put: Sequence[Tensor] | None = None) -> None:
        self._put, self._began = put, list[Tensor]()
        self.outputs: list[Tensor] = []

    def __call__(self, call: SiteCall, state: Generation) -> Output:
        assert isinstance(call, StackCall)
        if call.member.place == 0:
            self._began.append(call.image)
        if not call.member.last:
            return call.run() if self._put is None else call.handed_on()
        call.began, call.visual = self._began[-1], state.tokens.visual_slice
        state.stats.record_pass(state.prepared(call.site, FULL, Writes()).count)
        if self._put is not None:
            return call.restore(self._put[len(self._began) - 1])
        out = call.run()
        added = call.storable(out)
        assert isinstance(added, Tensor)
        self.outputs.append(added)
        return out


class _Recorder:
    """Measures the change of the guided output for each change of the stack's output.

    The last layers change little from one step to the next. So the changes are measured in every `EVERY`th step, and stand for
    those of the steps before it as well: what the stack gave in these is among what is tried.
    """

    def __init__(self, calibration: CalibrationRun, channels: int | None, ages: int) -> None:
        self._calibration, self._channels, self._ages = calibration, channels, ages
        self._history: deque[list[Tensor]] = deque(maxlen=ages + EVERY - 1)
        self._scales: list[float] = []  # of the guidance, in this step and those before it that were not measured
        self._sketch: _Sketch | None = None
        self._full: list[float] = []
        self._skipped: list[float] = []
        self.changes: list[Tensor] = []  # of each step: (ages + 1, branches, SKETCH)
        self.products: list[Tensor] = []  # of each step: (branches, ages + 1, ages + 1)
        self.images = 0
        self.extra_seconds = 0.0
        self.flops = 0.0, 0.0  # of the first step, in full and with all blocks skipped

    def follow(self, step: Step) -> None:
        """Let the step run in full, and try what skipping it would change."""
        if step.first:
            self._history.clear()
        guidance = Guidance(self._calibration.joined_branches, self._calibration.guidance_scale(step.index), self._channels)
        whole, started = _StackAt(), clock()
        with flop_counter() if not self._full else nullcontext() as full:
            parts = _branches(step.finish_by(whole), guidance)
        self._full.append(clock() - started)
        if full is not None:
            self.flops = full.get_total_flops(), 0.0
        if not all(part.isfinite().all() for part in parts):
            raise InputsInvalid(
                f"got values that are not finite from the transformer in step {step.index}, wanted finite ones; nothing can be "
                "learnt from this generation; use bfloat16 or float32"
            )
        trying = clock()
        now, self.images = whole.outputs, len(parts[0])
        self._multiply(now, guidance)
        self._scales.append(guidance.scale)
        known = self._calibration.step_count, self._calibration.switch
        if known[0] is None or step.index + 1 in known or len(self._scales) == EVERY:
            self._try(step, now, parts, guidance)
            self._scales.clear()
        self._history.appendleft(now)
        self.extra_seconds += clock() - trying

    def _try(self, step: Step, now: list[Tensor], parts: list[Tensor], guidance: Guidance) -> None:
        """Measure the changes of this step; the steps before it that were not measured get theirs from these."""
        if self._sketch is None:
            self._sketch = _Sketch(parts[0].numel(), parts[0].device)
        nudge = NUDGE if now[0].dtype.itemsize >= 4 else 1.0
        tried = list[Tensor]()  # for now and each earlier step: (branches, SKETCH)
        for earlier in (None, *self._history):
            outputs = [each * (1 + nudge) if earlier is None else each.lerp(earlier[i], nudge) for i, each in enumerate(now)]
            put, started = _StackAt(outputs), clock()
            with flop_counter() if not self._skipped else nullcontext() as skipped:
                samples = step.tried(put)
            self._skipped.append(clock() - started)
            if skipped is not None:
                self.flops = self.flops[0], skipped.get_total_flops()
            after = zip(_branches(samples, guidance), parts, strict=True)
            tried.append(torch.stack([self._sketch((part - before) / nudge) for part, before in after]))
        whole, to = tried[0], torch.stack([torch.zeros_like(tried[0]), *tried[1:]])  # J·O, and J·(O_{t−k} − O) for each k
        for back, scale in zip(reversed(range(len(self._scales))), self._scales, strict=True):
            changes = torch.zeros(self._ages + 1, len(parts), SKETCH)
            older = to[back + 1 : back + 1 + self._ages] - to[back]
            changes[0], changes[1 : 1 + len(older)] = whole + to[back], older
            weights = [1.0] if len(parts) == 1 else [scale, 1 - scale]  # of the branches, in the guided output
            self.changes.append(changes * torch.tensor(weights)[:, None])

    def _multiply(self, now: list[Tensor], guidance: Guidance) -> None:
        """Note the scalar products of the stack's outputs of this step and of those before, of each branch."""
        products = torch.zeros(1 + guidance.branches.batched, self._ages + 1, self._ages + 1)
        if self._history:
            products[:, 1:, 1:] = self.products[-1][:, :-1, :-1]
        mine = _of_branches(now, guidance)
        for age, earlier in enumerate([now, *self._history][: self._ages + 1]):
            for b, (a, other) in enumerate(zip(mine, _of_branches(earlier, guidance), strict=True)):
                products[b, age, 0] = products[b, 0, age] = _product(a.flatten(), other.flatten())
        self.products.append(products)

    def seconds(self) -> tuple[float, float]:
        """Seconds of the transformer's calls in a step that computes, and in one that skips all blocks: medians."""
        full, skipped = (torch.tensor(times or [0.0]).median() for times in (self._full, self._skipped))
        return float(full), float(skipped)


def _product(one: Tensor, other: Tensor) -> float:
    """⟨one, other⟩, summed in at least 32 bits."""
    return float(torch.dot(one, other) if one.dtype.itemsize >= 4 else (one * other).sum(dtype=torch.float32))


def _of_branches(outputs: Sequence[Tensor], guidance: Guidance) -> list[Tensor]:
    """The rows of the conditional branch, and those of the unconditional one, of the outputs (B, N, C) of a step's calls."""
    if len(outputs) > 1:
        return list(outputs)
    conditional, other = guidance.halves(outputs[0])
    return [conditional] if other is None else [conditional, other]


def _branches(samples: Sequence[Tensor], guidance: Guidance) -> list[Tensor]:
    """The output of each branch, (images, C, …), float32: the conditional one, and the unconditional one with guidance."""
    conditional, other = guidance.halves(guidance.latent(torch.cat(tuple(samples)).float()))
    return [conditional] if other is None else [conditional, other]


class _Sketch:
    """A random projection to `SKETCH` numbers that keeps norms: each element goes, with a random sign, into one of them.

    Norms of sums of changes are then those of sums of sketches, but for a relative error of √(2 / SKETCH) in the square
    (count sketch; Charikar, Chen and Farach-Colton 2002).
    """

    def __init__(self, elements: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0xC0DE)
        self._place = torch.randint(SKETCH, (elements,), generator=generator).to(device)
        self._sign = (torch.randint(2, (elements,), generator=generator) * 2 - 1).to(device, torch.float32)

    def __call__(self, value: Tensor) -> Tensor:
        """The sketch of a tensor of so many elements: (SKETCH,), on the CPU."""
        out = torch.zeros(SKETCH, device=value.device)
        return out.index_add_(0, self._place, value.flatten() * self._sign).cpu()
