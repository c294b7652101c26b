"""One instrumented run of a pipeline, turned inside out: the search drives, step by step, and the pipeline waits.

The pipeline's own loop runs in a greenlet of the same thread. At every call of its transformer it hands over to the search,
which runs that call as often as it likes, with any cells, and decides with which output the pipeline goes on. Where a step has
two calls, one for each CFG branch, the first is answered with a stand-in, so that the search has both before it decides.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from arrowhead.calibration.isolation import exclusive_call, preserved_rng
from arrowhead.calibration.outputs import output_with, samples_of
from arrowhead.calibration.paired_calls import fill_placeholder, placeholder_output, run_paired, wait_for_pair
from arrowhead.calibration.sharding import share_of
from arrowhead.engine.cache import Output
from arrowhead.engine.compile_boundary import force_eager
from arrowhead.engine.execute_site import execute_site
from arrowhead.engine.forward_hooks import forward_replaced
from arrowhead.engine.generation import Generation
from arrowhead.engine.site_calls import SiteCall
from arrowhead.engine.stats import Stats
from arrowhead.engine.wrappers import intercepted
from arrowhead.errors import ArrowheadError, InputsInvalid, NotIntercepted
from arrowhead.models.model import Model
from arrowhead.plans.cells import FULL, Attend, Cell, refreshes_residual, residual_radius
from arrowhead.plans.flops import full_flops
from arrowhead.plans.layout import Branches, Site, Tokens, outermost
from arrowhead.plans.lifetimes import FOREVER, Residual, Writes


@dataclass(frozen=True)
class SearchResult:
    """What a search ends with. `cost` is what it spent in attention FLOPs, in uncompressed generations of its inputs."""

    cells: tuple[tuple[Cell, ...], ...]
    tokens: Tokens
    branches: Branches
    passes: int
    cost: float
    switch: int | None


LEAVE_OUT = "leave out what changes the run on its way, such as a callback that ends guidance, or interrupts it"
AtSite = Callable[[SiteCall, Generation], Output]
"""What a search does where a site's module is called: it gives what the module should."""


@dataclass(frozen=True)
class _Call:
    """A call of a transformer by the pipeline: its tokens, rows, how to run it, and whether it scales a LoRA meanwhile.

    The pipeline goes on with the first `returned` tokens of what it gives, or with all. `counted` is what its scheduler counts.
    """

    transformer: nn.Module
    tokens: Tokens
    rows: int
    run: Callable[[], Any]
    scales: bool
    returned: int | None
    counted: int | None


class CalibrationRun:
    """A run of a pipeline under a search's control: iterate over `steps()`, and finish each.

    `passes` counts the transformer's runs, two calls of one step as one. What torch.compile made of it is left aside: all of
    them run eagerly.
    """

    def __init__(self, model: Model, inputs: Mapping[str, Any]) -> None:
        self.branches = model.branches(model.call_arguments((), inputs))
        self.passes = 0
        self.rows = 0  # of all calls of a step, known from the first one on
        self._model, self._inputs = model, inputs
        self._around: Callable[[SiteCall], Output] | None = None  # set while the transformer runs under the search
        self._generation: Generation | None = None
        self._blank: Any = None  # what a call of the transformer gives, where the first of two has to be answered early

    @property
    def tokens(self) -> Tokens:
        """The tokens of the run.

        Raises:
            NotIntercepted: the pipeline never called its transformer.
        """
        return self._state.tokens

    @property
    def step_count(self) -> int | None:
        """The steps of the whole run, as far as anybody knows them."""
        return self._model.steps

    def steps(self) -> Generator["Step", None, None]:
        """The denoising steps, one after another. Closing the iterator ends the pipeline's run where it is.

        Whatever happens, the pipeline, the generators among its inputs and the global random state are left as they were, but
        for the scheduler's timesteps, which every call of the pipeline sets anew. Between two steps the pipeline is in use:
        its transformer cannot be called, and what is drawn from the global random state meanwhile is drawn again afterwards.
        """
        pipe = self._model.pipe

        def hand_over(transformer: nn.Module, own_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if greenlet.getcurrent() is not worker:
                raise ArrowheadError(
                    f"{type(transformer).__name__} was called from outside while a search runs on it; wanted the pipeline's "
                    "own calls alone; let the search end, or close it, first"
                )
            if self.branches.calls == 2:  # the pipeline may change what it gave before the first call is looked at
                kwargs = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
            arguments = self._model.transformer_arguments(args, kwargs)
            tokens, rows = self._model.tokens(arguments), len(self._model.latents(arguments))
            scales = {value.get("scale") for value in kwargs.values() if isinstance(value, dict)} - {None, 1}
            run, returned = partial(_run_forward, own_forward, args, kwargs), self._model.family.output_tokens(arguments)
            counted = self._model.scheduler_step
            return worker.parent.switch(_Call(transformer, tokens, rows, run, bool(scales), returned, counted))

        with (
            preserved_rng(pipe, self._inputs.get("generator")),
            exclusive_call(pipe) as call_pipe,
            ExitStack() as replaced,
            intercepted(self._model.site_modules, self._at, self._model.forwards),
        ):
            for transformer in self._model.transformers:
                replaced.enter_context(forward_replaced(transformer, partial(hand_over, transformer, transformer.forward)))
            outer = torch.is_grad_enabled()  # the modes belong to the thread, which the two greenlets share
            inference = torch.is_inference_mode_enabled()
            worker = greenlet.greenlet(lambda: call_pipe(**self._inputs))
            call = _resumed(worker)
            try:
                while not worker.dead:
                    calls, stand_in = [call], None
                    if self.branches.calls == 2:
                        stand_in = self._stand_in(call)
                        calls.append(_resumed(worker, stand_in))
                        if worker.dead or calls[1].counted != call.counted:
                            raise InputsInvalid(
                                "got one call of the transformer in a step, wanted one for each CFG branch; where both come in "
                                f"one batch, say so: cfg of the adapter; {LEAVE_OUT}"
                            )
                    images = sum(call.rows for call in calls) // (self.branches.samples * self.branches.calls)
                    share_of(self._inputs).of_all(images)
                    step = Step(self._begin(calls), self, [call.run for call in calls], call.returned)
                    inner = torch.is_grad_enabled()
                    with torch.inference_mode(inference):
                        torch.set_grad_enabled(outer)
                        try:
                            yield step
                        finally:
                            outer = torch.is_grad_enabled()
                    torch.set_grad_enabled(inner)
                    if stand_in is not None:
                        fill_placeholder(stand_in, step.answers[0])
                    call = _resumed(worker, step.answers[-1])
                if self._generation is not None and self.step_count not in (None, done := self._generation.step + 1):
                    raise InputsInvalid(
                        f"the pipeline's run ended after {done} of {self.step_count} steps, wanted all of them; {LEAVE_OUT}"
                    )
            finally:
                if not worker.dead:
                    worker.throw(greenlet.GreenletExit)
                torch.set_grad_enabled(outer)

    @property
    def cost(self) -> float:
        """The search's attention FLOPs (matmuls) so far, in uncompressed generations of the same inputs.

        Without the one run of a single call that stands in for what is not known yet, where a step has two.
        """
        stats, sites = self._state.stats, outermost(self._model.sites)
        samples = self._state.branches.samples
        raw = full_flops(sites, self.tokens, samples).attention
        return stats.spent.attention / ((raw or 1) * (self.step_count or self._state.step + 1))

    def found(self, rows: Sequence[Sequence[Cell]]) -> SearchResult:
        """The end of a search with these cells, steps × sites."""
        return SearchResult(tuple(map(tuple, rows)), self.tokens, self.branches, self.passes, self.cost, self.switch)

    @property
    def switch(self) -> int | None:
        """The step from which a second transformer is called."""
        return self._model.switch

    @property
    def joined_branches(self) -> Branches:
        """The branches as a search sees them: two calls of a step look like one batch, see `lockstep`."""
        return Branches("cond_first", guided=True) if self.branches.calls == 2 else self.branches

    def forward(self, runs: Sequence[Callable[[], Any]], at_site: AtSite, *, grad: bool = False) -> list[Any]:
        """Run the transformer, each site as `at_site` has it: what each of a step's calls gives."""
        passes = self._state.stats.passes
        before, self.passes = passes.total(), self.passes + 1
        try:
            with torch.set_grad_enabled(grad), force_eager():
                if len(runs) == 1:
                    self._around = lambda call: at_site(call, self._state)
                    outputs = [runs[0]()]
                else:
                    self._around = wait_for_pair
                    outputs = run_paired(runs, lambda call: self._answered(call, at_site))
        finally:
            self._around = None
        if passes.total() - before != len(self._model.sites):
            raise NotIntercepted(
                f"one call of the transformer passed {passes.total() - before} sites, wanted "
                f"{len(self._model.sites)}; nothing can be learnt about the others, so the search ends here"
            )
        return outputs

    def _answered(self, call: SiteCall, at_site: AtSite) -> Output:
        """For both calls of a step at once; so are the sites within a block that runs meanwhile."""
        before, self._around = self._around, lambda inner: at_site(inner, self._state)
        try:
            return at_site(call, self._state)
        finally:
            self._around = before

    @contextmanager
    def traced(self, runs: Sequence[Callable[[], Any]], at_site: AtSite) -> Iterator[list[Any]]:
        """`forward` with gradients. Within the block they may be asked for, and blocks that are checkpointed run again."""
        outputs = self.forward(runs, at_site, grad=True)
        try:
            if len(runs) == 1:
                self._around = lambda call: at_site(call, self._state)
            with force_eager():
                yield outputs
        finally:
            self._around = None

    def _stand_in(self, call: _Call) -> Any:
        if self._blank is None:  # one run more than the search needs
            self.passes += 1
            with torch.no_grad(), force_eager():
                self._blank = call.run()
        return placeholder_output(self._blank)

    @property
    def _state(self) -> Generation:
        if self._generation is None:
            raise NotIntercepted("the pipeline never called its transformer; wanted at least one denoising step")
        return self._generation

    def _begin(self, calls: Sequence[_Call]) -> int:
        """On to the next step; gives its number."""
        tokens = calls[0].tokens
        if len(calls) == 2 and any(call.scales for call in calls):
            raise InputsInvalid(
                "got a LoRA scale among the attention arguments of a pipeline that calls its transformer twice a step, which "
                "scales its layers in each; wanted none while searching; fuse the LoRA, or set its weight with set_adapters"
            )
        if any(call.tokens != tokens for call in calls):
            raise InputsInvalid(
                f"got {calls[0].tokens} for the prompt and {calls[1].tokens} for the negative prompt, wanted one length, so "
                "that they can share; bring both to the same number of tokens"
            )
        rows = sum(call.rows for call in calls)
        if rows != (self.rows or rows):
            raise InputsInvalid(
                f"got a batch of {rows} in step {self._state.step + 1}, wanted {self.rows} as before; {LEAVE_OUT}"
            )
        self.rows = rows
        if self._generation is None:
            self._generation = Generation.begin(self.joined_branches, tokens, "auto", Stats(self.joined_branches.samples))
        else:
            self._generation.advance(tokens)
        if any(call.transformer is not self._model.transformer_at(self._generation.step) for call in calls):
            raise NotIntercepted(
                f"got step {self._generation.step} with another transformer than the scheduler's timesteps and the pipeline's "
                "boundary_ratio say; wanted diffusers' own loop"
            )
        return self._generation.step

    def _at(self, call: SiteCall) -> Output:
        if self._around is None:
            return call.native()
        return self._around(call)


class Step:
    """One step of the pipeline, which waits: one call of the transformer, or one for each CFG branch.

    Outputs are what the pipeline goes on with, the first `returned` tokens or everything.
    """

    def __init__(
        self, index: int, calibration: CalibrationRun, runs: Sequence[Callable[[], Any]], returned: int | None = None
    ) -> None:
        self.index = index
        self.answers: list[Any] = []
        self._calibration, self._runs, self._returned = calibration, runs, returned

    @property
    def sites(self) -> tuple[Site, ...]:
        """The transformer's sites, in the order they run."""
        return self._calibration._model.sites

    @property
    def first(self) -> bool:
        """Whether it is a transformer's first step: what was kept before is not to be read."""
        return self.index in (0, self._calibration.switch)

    def full(self) -> Tensor:
        """The transformer's output with full attention everywhere."""
        return self.output([FULL] * len(self.sites))

    def output(self, cells: Sequence[Cell]) -> Tensor:
        """The transformer's output with these cells, all branches; nothing is remembered."""
        samples = self._used(samples_of(self._calibration.forward(self._runs, self._by(cells, lambda *_: Writes()))))
        return samples[0] if len(samples) == 1 else torch.cat(samples)

    @contextmanager
    def traced(self, at_site: AtSite) -> Iterator[list[Tensor]]:
        """Let the pipeline go on with the output that comes of `at_site`; gives each call's, for gradients to start from."""
        with self._calibration.traced(self._runs, at_site) as outputs:
            samples = samples_of(outputs)
            self.answers = [output_with(output, sample.detach()) for output, sample in zip(outputs, samples, strict=True)]
            yield self._used(samples)

    def finish(self, cells: Sequence[Cell], candidates: Mapping[Site, Sequence[Cell]]) -> None:
        """Let the pipeline go on with the output under these cells, and remember all that `candidates` may read later."""
        self.answers = self._calibration.forward(
            self._runs, self._by(cells, lambda site, cell: _writes(candidates[site], cell))
        )

    def finish_by(self, at_site: AtSite) -> list[Tensor]:
        """Let the pipeline go on with the output that comes of `at_site`; gives each call's."""
        self.answers = self._calibration.forward(self._runs, at_site)
        return self._used(samples_of(self.answers))

    def tried(self, at_site: AtSite) -> list[Tensor]:
        """The output that comes of `at_site`, each call's; the pipeline knows nothing of it."""
        return self._used(samples_of(self._calibration.forward(self._runs, at_site)))

    def _used(self, samples: Sequence[Tensor]) -> list[Tensor]:
        return [sample[:, : self._returned] for sample in samples]

    def _by(self, cells: Sequence[Cell], writes: Callable[[Site, Cell], Writes]) -> AtSite:
        cell_of = dict(zip(self.sites, cells, strict=True))
        return lambda call, state: _execute(call, cell_of[call.site], writes(call.site, cell_of[call.site]), state)


def _execute(call: SiteCall, cell: Cell, writes: Writes, state: Generation) -> Output:
    return execute_site(call, state.prepared(call.site, cell, writes), state)


def _resumed(worker: greenlet.greenlet, *answer: Any) -> Any:
    """On to the pipeline's next call of its transformer, which is not compiled: a graph could not be left in the middle."""
    with force_eager():
        return worker.switch(*answer)


def _run_forward(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A call whose arguments may have been made in torch.inference_mode, which the loop runs in and the search does not."""

    def own(value: Any) -> Any:
        if isinstance(value, list):  # HunyuanDiT empties the one that a ControlNet gave
            return [*value]
        made_there = isinstance(value, Tensor) and value.is_inference() and not torch.is_inference_mode_enabled()
        return value.clone() if made_there else value

    return forward(*map(own, args), **{name: own(value) for name, value in kwargs.items()})


def _writes(candidates: Sequence[Cell], cell: Cell) -> Writes:
    """In a search all that some later step might read is kept until it is overwritten."""
    if not isinstance(cell, Attend):
        return Writes()
    radii = {residual_radius(candidate) for candidate in candidates} if refreshes_residual(cell) else set()
    residuals = (Residual(radius, FOREVER, conditional_only=False) for radius in radii if radius is not None)
    return Writes(FOREVER, tuple(residuals))


def require_finite(out: Tensor, call: SiteCall, state: Generation) -> None:
    """Raises InputsInvalid for what a site gave with full attention, unless it is finite."""
    if not all(bool(end.isfinite()) for end in out.detach().aminmax()):  # one pass, and nothing allocated; NaN is either end
        raise InputsInvalid(
            f"at step {state.step} {call.site.path} gave values that are not finite, with full attention; wanted finite ones; "
            "use bfloat16 or float32"
        )
