"""The calibration run: one generation of a driver, in which a search is called at every denoising step.

The transformer's forward is wrapped. When the pipeline, or the loop, calls the transformer, the wrapper calls the search with a
`Step`. The search runs the call as often as it needs, with any cells, and finishes the step with the output to go on with.
Where a step has two calls, one for each CFG branch, the first call gives a placeholder. The second one calls the search with
both, and fills the placeholder, with what the pipeline has computed with it (`placeholder`).

Where a pipeline runs several denoising loops in one call, the search sees the first one.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import greenlet
import torch
from torch import nn

from arrowhead.calibration.driver import Driver
from arrowhead.calibration.outputs import run_forward, samples_of
from arrowhead.calibration.pair_of_lengths import Lengths, PairOfLengths
from arrowhead.calibration.paired_calls import join_lengths, run_paired, wait_for_pair
from arrowhead.calibration.placeholder import Placeholder
from arrowhead.calibration.search_result import SearchResult
from arrowhead.calibration.step import AtSite, Runs, Step
from arrowhead.calibration.transformer_call import LEAVE_OUT, TransformerCall, call_missing, require_one_image
from arrowhead.engine.attention_seen import attention_seen, listed
from arrowhead.engine.cache import Output
from arrowhead.engine.changes import Changes
from arrowhead.engine.compile_boundary import force_eager
from arrowhead.engine.forward_hooks import replace_forward
from arrowhead.engine.generation import Generation
from arrowhead.engine.loop_checks import BranchCheck, numbers_of
from arrowhead.engine.site_calls import SiteCall
from arrowhead.engine.stats import Stats
from arrowhead.engine.wrappers import Interception
from arrowhead.errors import ArrowheadError, InputsInvalid, NotIntercepted
from arrowhead.models.conflicts import require_weights
from arrowhead.models.model import Model, target_of
from arrowhead.models.weights import fingerprint
from arrowhead.plans.cells import Cell
from arrowhead.plans.flops import full_flops
from arrowhead.plans.layout import Branches, Site, Tokens, outermost
from arrowhead.plans.target import Target


class _Stopped(BaseException):
    """Ends the run after its first step or loop; no `except Exception` of a pipeline catches it."""


class CalibrationRun:
    """One generation of a driver, with a search at every step of it, see `run`.

    `branches` are those of the run's calls, `of_calls` the tokens of each call of a step. With `other_texts` these have texts
    of two lengths, in this process or another one, so that branches share no text. `passes` counts the transformer's runs, two
    calls of a step as one. `rows` are the batch rows of all calls of a step, known from the first step on. What is compiled
    with torch.compile runs eagerly.
    """

    def __init__(self, driver: Driver, model: Model) -> None:
        self._driver, self._model = driver, model
        require_weights(model.transformers)
        self._arguments = driver.call_arguments(model)
        self._target_before, self._weights = target_of(model), fingerprint(model.transformers)
        self.branches = model.branches(self._arguments)
        self._branch_check = BranchCheck(self.branches) if driver.scheduler is None else None  # a loop's; pipelines are known
        self.passes = 0
        self.rows = 0
        self._caller = greenlet.getcurrent()  # where the run's own calls come from
        self._searching = False  # while `on_step` runs
        self._failure: Exception | None = None  # what `on_step` raised; a loop might catch it, and go on
        self._at_site: Callable[[SiteCall], Output] | None = None  # set while the search runs the transformer
        self._first_calls: dict[Site, None] = {}  # the sites in the order of their first calls
        self.of_calls: tuple[Tokens, ...] = ()
        self.other_texts = False
        self._lengths: dict[str, tuple[Lengths, ...]] = {}  # of sites' outputs, where the calls' texts have two
        self._generation: Generation | None = None
        self._timesteps: Any = None  # the scheduler's, in the first loop
        self._levels: tuple[float, ...] | None = None
        self._waiting: tuple[TransformerCall, Placeholder] | None = None  # the first of a step's two calls, and its placeholder
        self._apart = all(site.kind == "stack" for site in model.sites)  # two calls share nothing: one runs after the other
        self._example: Any = None  # an output of the transformer, which placeholders are copies of

    def run(self, on_step: Callable[[Step], None], *, first_only: bool = False) -> Any:
        """Generate once, and call `on_step` at every denoising step; gives what the pipeline's call, or the loop, gives.

        `on_step` has to finish the step: by `Step.finish`, `finish_by` or `traced`. It runs in the caller's grad mode and
        inference mode. With `first_only` the run ends after the first step, and gives None. Of a call with several
        denoising loops the search sees the first one. The run ends there, too, unless the driver wants the call's result.

        However the run ends, the pipeline, the generators among its inputs and the global random state are then as before, but
        for the scheduler's timesteps, which every call of a pipeline sets. During the run other calls of the pipeline, and of
        its transformer, are refused.

        Raises:
            InputsInvalid: tokens or rows change on the way, a call of a step is missing, or the run ends early.
            NotIntercepted: the pipeline never called its transformer, or a call does not pass every site once.
        """
        inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

        def search(step: Step) -> None:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                on_step(step)
            if first_only:
                raise _Stopped

        self._caller, result = greenlet.getcurrent(), None
        interception, changes = Interception(self._model, self._site_called), Changes()
        with torch.set_grad_enabled(grad), changes, changes:
            generate = self._driver.prepare(changes)
            interception.install(changes)
            for transformer in self._model.transformers:
                called: Any = partial(self._transformer_called, search, transformer, transformer.forward)
                called.__signature__ = inspect.signature(transformer.forward)  # modular pipelines pass what it names
                replace_forward(transformer, called, changes)
            try:
                with suppress(_Stopped):
                    result = generate()
            finally:
                if self._waiting is not None:
                    self._waiting[1].end()
        interception.warn_of_replaced()
        if self._failure is not None:
            raise self._failure
        if self._waiting is not None:
            raise call_missing()
        done = self._begun.step + 1
        if not first_only and self.step_count not in (None, done):
            raise InputsInvalid(
                f"the pipeline's run ended after {done} of {self.step_count} steps, wanted all of them; {LEAVE_OUT}"
            )
        return result

    @property
    def tokens(self) -> Tokens:
        """The tokens of the run.

        Raises:
            NotIntercepted: the pipeline never called its transformer.
        """
        return self._begun.tokens

    @property
    def step_count(self) -> int | None:
        """The steps of the whole run; None for a loop, whose steps are known at its end."""
        return self._model.steps if self._levels is None else len(self._levels)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites in the order in which they run; until all have been called, in the order of the model's modules."""
        return tuple(self._first_calls) if len(self._first_calls) == len(self._model.sites) else self._model.sites

    @property
    def target(self) -> Target:
        """What was run, its sites in the order in which they run; without settings that the scheduler changes as it runs."""
        in_order = replace(self._model, modules={site: self._model.modules[site] for site in self.sites})
        return replace(target_of(in_order).common(self._target_before), levels=self._levels, weights=self._weights)

    @property
    def cost(self) -> float:
        """The search's attention FLOPs (matmuls) so far, in uncompressed generations of the same inputs.

        The run that a placeholder is copied from does not count.
        """
        stats, sites = self._begun.stats, outermost(self._model.sites)
        raw = full_flops(sites, self.tokens, self._begun.branches.samples).attention
        return stats.spent.attention / ((raw or 1) * (self.step_count or self._begun.step + 1))

    @property
    def switch(self) -> int | None:
        """The step from which a second transformer is called."""
        return self._model.switch

    @property
    def joined_branches(self) -> Branches:
        """The branches as a search sees them: two calls of a step are joined to one batch, see `paired_calls`."""
        return Branches("cond_first", guided=True) if self.branches.calls == 2 else self.branches

    def guidance_scale(self, step: int) -> float:
        """The scale of classifier-free guidance in a step; 1 without guidance."""
        return self._model.guidance_scale(self._arguments, step) if self.branches.guided else 1.0

    def found(self, rows: Sequence[Sequence[Cell]]) -> SearchResult:
        """The result of a search that chose these cells, steps × `sites`."""
        cells = tuple(map(tuple, rows))
        return SearchResult(cells, self.target, self.tokens, self.branches, self.passes, self.cost, self.switch)

    def forward(self, runs: Runs, at_site: AtSite, *, grad: bool = False) -> list[Any]:
        """Run a step's calls of the transformer, with each site's output from `at_site`; gives the calls' outputs.

        Raises:
            NotIntercepted: not every site was passed once.
        """
        counts = self._begun.stats.counts
        before, self.passes = counts.total(), self.passes + 1
        try:
            with torch.set_grad_enabled(grad), force_eager():
                if len(runs) == 1 or self._apart:
                    self._at_site = lambda call: at_site(call, self._begun)
                    outputs = [*map(self._one, runs, self.of_calls)]
                else:
                    self._at_site = wait_for_pair
                    called = partial(self._pair_called, at_site)
                    join = join_lengths(self.of_calls, self._lengths, called) if len({*self.of_calls}) > 1 else None
                    outputs = run_paired(runs, called, join)
        finally:
            self._at_site = None
        if (passed := counts.total() - before) != len(self._model.sites) * (len(runs) if self._apart else 1):
            raise self._sites_missed(runs[0], passed)
        return outputs

    def _one(self, run: Callable[[], Any], tokens: Tokens) -> Any:
        """One call of a step that is run by itself."""
        self._begun.tokens = tokens
        return run()

    @contextmanager
    def traced(self, runs: Runs, at_site: AtSite) -> Iterator[list[Any]]:
        """`forward` with gradients, which can be asked for within the block; checkpointed blocks run again there."""
        outputs = self.forward(runs, at_site, grad=True)
        try:
            if len(runs) == 1:
                self._at_site = lambda call: at_site(call, self._begun)
            with force_eager():
                yield outputs
        finally:
            self._at_site = None

    @property
    def _begun(self) -> Generation:
        if self._generation is None:
            raise NotIntercepted("the pipeline never called its transformer; wanted at least one denoising step")
        return self._generation

    def _transformer_called(
        self,
        search: Callable[[Step], None],
        transformer: nn.Module,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """A transformer's forward during the run: gives the output that the search finishes the step with."""
        if self._searching or greenlet.getcurrent() is not self._caller:
            raise ArrowheadError(
                f"{type(transformer).__name__} was called from outside while a search runs on it; wanted the pipeline's "
                "own calls alone; let the search end first"
            )
        if self._failure is not None:
            raise self._failure
        if self._loop_ended():
            if not self._driver.wants_result:
                raise _Stopped
            return forward(*args, **kwargs)
        call = self._call(transformer, forward, args, kwargs)
        if self.branches.calls == 1:
            return self._searched(search, [call])[0]
        if self._waiting is None:
            self._waiting = call, self._placeholder(call)
            return self._waiting[1].watch()
        (first, placeholder), self._waiting = self._waiting, None
        placeholder.end()
        if call.counted != first.counted:
            raise call_missing()
        outputs = self._searched(search, [first, call])
        placeholder.fill(outputs[0])
        return outputs[1]

    def _loop_ended(self) -> bool:
        """Whether the first denoising loop of the pipeline's call has ended, and another one runs."""
        ended = self._waiting is None and self._generation is not None and self._generation.step + 1 == self.step_count
        return ended and self._model.timesteps is not self._timesteps

    def _call(
        self, transformer: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TransformerCall:
        model = self._model
        if self.branches.calls == 2:  # the pipeline may change what it gave before the first call runs
            args = tuple(copy(value) if isinstance(value, list) else value for value in args)
            kwargs = {name: copy(value) if isinstance(value, dict | list) else value for name, value in kwargs.items()}
        arguments = model.transformer_arguments(args, kwargs)
        scales = {value.get("scale") for value in kwargs.values() if isinstance(value, dict)} - {None, 1}
        return TransformerCall(
            transformer,
            model.tokens(arguments),
            model.latents(arguments),
            partial(run_forward, forward, args, kwargs),
            bool(scales),
            used if isinstance(used := model.family.output_tokens(arguments), slice) else slice(used),
            model.scheduler_step,
            numbers_of(arguments) if self._branch_check else {},
        )

    def _placeholder(self, call: TransformerCall) -> Placeholder:
        """What the first of two calls gives until the second has come; the first placeholder takes a run of the transformer."""
        if self._example is None:
            self.passes += 1
            with torch.no_grad(), force_eager():
                self._example = call.run()
            samples_of([self._example])  # refused before the pipeline gets a copy
        return Placeholder(self._example)

    def _searched(self, search: Callable[[Step], None], calls: Sequence[TransformerCall]) -> list[Any]:
        """On to the next step, of these calls; gives their outputs, which the search decided."""
        self._require_alike(calls)
        runs, latents = [call.run for call in calls], [call.latents for call in calls]
        step = Step(self._advance(calls), self, runs, latents, calls[0].returned)
        self._searching = True
        try:
            if self._branch_check is not None:
                for number, call in enumerate(calls):
                    self._branch_check.check(step.index, number, call.latents, call.numbers)
            search(step)
        except Exception as error:
            self._failure = error
            raise
        finally:
            self._searching = False
        return step.outputs

    def _require_alike(self, calls: Sequence[TransformerCall]) -> None:
        """Check that a step's calls can be joined to one batch, and have as many rows as those of the steps before."""
        if not all(isinstance(latents := call.latents, list) or getattr(latents, "ndim", 0) for call in calls):
            raise InputsInvalid(
                f"got a {type(latents).__name__} as the first argument of a {self._model.family.name}, wanted the latents, a "
                "tensor (B, …) or a list with one for each image; wrap the model, so that its forward takes them first"
            )
        rows = sum(len(call.latents) for call in calls)
        self._driver.share.of_all(rows // (self.branches.samples * self.branches.calls))
        if len(calls) == 2 and any(call.scales for call in calls):
            raise InputsInvalid(
                "got a LoRA scale among the attention arguments of a pipeline that calls its transformer twice a step, which "
                "scales its layers in each; wanted none while searching; fuse the LoRA, or set its weight with set_adapters"
            )
        if not self._apart:
            require_one_image(calls)
        if rows != (self.rows or rows):
            raise InputsInvalid(
                f"got a batch of {rows} in step {self._begun.step + 1}, wanted {self.rows} as before; {LEAVE_OUT}"
            )
        self.rows = rows

    def _advance(self, calls: Sequence[TransformerCall]) -> int:
        """On to the next step; gives its number. Two calls have the tokens of the longer text, see `pair_of_lengths`."""
        self.of_calls, share = tuple(call.tokens for call in calls), self._driver.share
        tokens = calls[0].tokens if self._apart else max(self.of_calls, key=lambda tokens: tokens.text)
        if self._generation is None:
            other = len({*self.of_calls}) > 1
            self.other_texts = other if share.alone else any(share.each(other))
            stats, self._timesteps, self._levels = (
                Stats(self.joined_branches.samples),
                self._model.timesteps,
                self._model.levels,
            )
            self._generation = Generation.begin(self.joined_branches, tokens, "auto", stats)
        else:
            self._generation.advance(tokens)
        step = self._generation.step
        if any(call.transformer is not self._model.transformer_at(step) for call in calls):
            raise NotIntercepted(
                f"got step {step} with another transformer than the scheduler's timesteps and the pipeline's "
                "boundary_ratio say; wanted diffusers' own loop"
            )
        return step

    def _sites_missed(self, run: Callable[[], Any], passed: int) -> NotIntercepted:
        """The error of a call of the transformer that did not pass every site once; says where attention is called."""
        root = self._model.transformer
        with suppress(Exception), torch.no_grad(), force_eager(), attention_seen(root) as seen:
            run()  # once more, watched
        never = [site.path for site in self._model.sites if site not in self._first_calls]
        said = f"; the forward of {listed(never)} was never called" if never else ""
        where = [f"{path or 'the forward'} ({type(root.get_submodule(path)).__name__})" for path in seen]
        if never and not self._model.pipe.scheduler:
            said += f", and torch's attention was called in {listed(where)}" if where else ", and torch's attention neither"
            said += "; name modules that are called and compute attention"
        return NotIntercepted(
            f"one call of the transformer passed {passed} sites, wanted {len(self._model.sites)}{said}; nothing can be learnt "
            "about the others, so the search ends here"
        )

    def _site_called(self, call: SiteCall) -> Output:
        self._first_calls.setdefault(call.site)
        return call.native() if self._at_site is None else self._at_site(call)

    def _pair_called(self, at_site: AtSite, call: SiteCall) -> Output:
        """A site's output for both calls of a step; so for the sites within a block, which run meanwhile."""
        before = self._at_site
        if not isinstance(call, PairOfLengths):
            self._at_site = lambda inner: at_site(inner, self._begun)
        try:
            return at_site(call, self._begun)
        finally:
            self._at_site = before
