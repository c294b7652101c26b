"""A plan: for each denoising step and each site, the cell that the site does there."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import dtype

from arrowhead.errors import InputsInvalid, PlanInvalid, PlanMismatch
from arrowhead.plans import atomic_write, file_format, flops, limits, memory, resample
from arrowhead.plans.about import about_in_file, require_about
from arrowhead.plans.card import Card
from arrowhead.plans.cells import AST, FULL, Attend, Cell, Full, Reuse, method_name, paper_name, uses_box
from arrowhead.plans.hub import OnHub
from arrowhead.plans.layout import Site, Tokens, outermost, stack_around
from arrowhead.plans.lifetimes import first_fault
from arrowhead.plans.memory import CacheDtype
from arrowhead.plans.resample import Conditions
from arrowhead.plans.target import Target, first_of


@dataclass(frozen=True)
class Plan(OnHub):
    """Steps × sites of cells, with what they were made for and how they were found.

    Attributes:
        cells: a row for each denoising step, with a cell for each of the target's sites, in their order. Where a stack and
            attention within it are among the sites, attention runs in the steps that the stack computes. In the others its cell
            is AST, and nothing is stored for them.
        target: the transformer, scheduler and sites that the plan is for.
        tokens: the tokens of a call. A plan without boxes is bound to no grid, so its tokens have none.
        guided: a generation has both CFG branches.
        about: provenance, for people to read: the search's settings, the model's name, the libraries' versions. Plans that
            differ in nothing else are equal.
        calls: how often the transformer is called in a step: 2 where each CFG branch has its own call, else 1.
        switch: the first step of a second transformer (Wan 2.2), or None where there is one transformer. The second one has the
            same sites, and reads nothing that the first one computed.

    Raises:
        PlanInvalid: rows of different length, a cell that its site cannot have, a cell that reads something that no earlier
            step of the same transformer computed, or a known entry of `about` of another type.

    >>> from arrowhead.plans.cells import AST, FULL, wa_rs
    >>> from arrowhead.plans.layout import Site
    >>> site = Site("transformer_blocks.0.attn1", heads=16, head_dim=72, channels=1152)
    >>> target = Target("DiTTransformer2DModel", "DDIMScheduler", {}, (site,))
    >>> plan = Plan(((FULL,), (wa_rs(32),), (AST,)), target, Tokens(256), guided=True)
    >>> plan.count()
    Counter({'full': 1, 'WA-RS': 1, 'AST': 1})
    >>> round(plan.flops().attention, 2)
    0.49
    """

    file_name = "plan.json"
    most_bytes = limits.MAX_BYTES
    cells: tuple[tuple[Cell, ...], ...]
    target: Target
    tokens: Tokens
    guided: bool
    about: Mapping[str, Any] = field(default_factory=dict, compare=False)
    calls: int = 1
    switch: int | None = None

    def __post_init__(self) -> None:
        self._require_types()
        self._settle_grid()
        self._require_steps_and_calls()
        self._require_sites()
        for site, column in zip(self.target.sites, self.columns, strict=True):
            self._require_column(site, column)

    def _require_types(self) -> None:
        rows = self.cells if isinstance(self.cells, tuple) else (None,)
        if not all(isinstance(row, tuple) and all(isinstance(cell, Attend | Reuse) for cell in row) for row in rows):
            raise PlanInvalid("got cells of something else, wanted a tuple of tuples, steps × sites, of Attend and Reuse")
        kinds = {"target": Target, "tokens": Tokens, "about": Mapping, "guided": bool, "calls": int, "switch": int | None}
        if wrong := [name for name, kind in kinds.items() if not isinstance(getattr(self, name), kind)]:
            found = {name: type(getattr(self, name)).__name__ for name in wrong}
            raise PlanInvalid(f"got {found}, wanted {', '.join(f'{name}: {kinds[name]}' for name in wrong)}")
        try:
            require_about(self.about)
        except ValueError as error:
            raise PlanInvalid(
                f"got an `about` that is none ({limits.shortened(error)}); wanted what a search writes there"
            ) from error

    def _settle_grid(self) -> None:
        """Drop the grid of a plan without boxes; refuse boxes without a grid."""
        cells = {cell for row in self.cells for cell in row if isinstance(cell, Attend)}
        if not any(uses_box(method) for cell in cells for method in cell.methods(1)):
            object.__setattr__(self, "tokens", self.tokens.flat)
        elif self.tokens.grid is None:
            raise PlanInvalid(
                f"got boxes for {self.tokens}, whose grid is not known; wanted tokens of a known grid; take radii in tokens"
            )

    def _require_steps_and_calls(self) -> None:
        if self.switch is not None and not 0 <= self.switch < len(self.cells):
            raise PlanInvalid(f"got switch={self.switch} with {len(self.cells)} steps, wanted one of them, or None")
        if self.target.levels is not None and len(self.target.levels) != len(self.cells):
            raise PlanInvalid(f"got {len(self.target.levels)} noise levels for {len(self.cells)} steps, wanted one for each")
        if self.calls not in (1, 2) or (self.calls == 2 and not self.guided):
            raise PlanInvalid(f"got {self.calls} calls a step, wanted 1, or 2 where there is guidance")

    def _require_sites(self) -> None:
        sites = self.target.sites
        if not self.cells or not sites:
            raise PlanInvalid(f"got {len(self.cells)} steps and {len(sites)} sites, wanted at least one each")
        inner = stack_around(sites)
        if beneath := set(sites) - set(outermost(sites)) - inner.keys():
            path = min(site.path for site in beneath)
            raise PlanInvalid(f"got site {path} and the block that it lies within, wanted one of the two; leave one out")
        for step, row in enumerate(self.cells):
            if len(row) != len(sites):
                raise PlanInvalid(f"step {step} has {len(row)} cells, wanted one for each of {len(sites)} sites")
            cell_of = dict(zip(sites, row, strict=True))
            for site, stack in inner.items():
                cell, skipped = cell_of[site], isinstance(cell_of[stack], Reuse)
                if not (cell == AST if skipped else isinstance(cell, Attend)):
                    raise PlanInvalid(
                        f"step {step}: got {paper_name(cell)} for {site.path} and {paper_name(cell_of[stack])} for the stack "
                        "around it; wanted AST for it in the steps that the stack skips, and in no other"
                    )

    def _require_column(self, site: Site, column: tuple[Cell, ...]) -> None:
        attends = [cell for cell in column if isinstance(cell, Attend)]
        if site.kind == "stack" and any(cell.share_cfg for cell in attends):
            raise PlanInvalid(f"site {site.path}: got share_cfg for a stack; wanted both CFG branches computed, or reused")
        if site.kind != "self_attention" and any(cell.method != Full() for cell in attends):
            raise PlanInvalid(f"site {site.path}: a {site.kind} has no heads; wanted it computed in full, or reused")
        if wrong := {len(cell.method) for cell in attends if isinstance(cell.method, tuple)} - {site.heads}:
            raise PlanInvalid(f"site {site.path} has {site.heads} heads, got methods for {min(wrong)}; wanted one for each")
        if fault := first_fault(column, self.switch):
            again = f", and again at step {self.switch}, where another transformer takes over" if self.switch else ""
            raise PlanInvalid(f"site {site.path}: {fault}; begin with full attention there{again}")

    @property
    def steps(self) -> int:
        """The number of denoising steps."""
        return len(self.cells)

    @property
    def columns(self) -> tuple[tuple[Cell, ...], ...]:
        """The columns: for each site, its cells over the steps."""
        return tuple(zip(*self.cells, strict=True))

    @property
    def samples(self) -> int:
        """How many samples the transformer computes per image and step: 2 with both CFG branches, else 1."""
        return 2 if self.guided else 1

    def count(self) -> Counter[str]:
        """How many cells have each of the papers' names (`paper_name`)."""
        return Counter(paper_name(cell) for row in self.cells for cell in row)

    def count_heads(self) -> Counter[str]:
        """How many heads have each of the papers' names, over all steps and all sites of self-attention."""
        count: Counter[str] = Counter()
        for site, cell in self._attention_cells():
            if isinstance(cell, Attend):
                count.update(method_name(method) for method in cell.methods(site.heads))
            else:
                count[paper_name(cell)] += site.heads
        return count

    def _attention_cells(self) -> Iterator[tuple[Site, Cell]]:
        """The cells of all steps at sites of self-attention, each with its site."""
        for row in self.cells:
            for site, cell in zip(self.target.sites, row, strict=True):
                if site.kind == "self_attention":
                    yield site, cell

    @cached_property
    def _remaining(self) -> flops.Flops:
        """Worked out once: `apply` asks for it in every generation that the plan is carried over to."""
        return flops.remaining_flops(self.cells, self.target.sites, self.tokens, self.samples)

    def flops(self) -> flops.Flops:
        """The parts of the uncompressed run's FLOPs that remain, with those that make residuals.

        `.attention` counts the two matmuls of self-attention. `.module` counts all that the plan's sites multiply: the Q, K, V
        and output projections, too, and cross-attentions, feed-forwards and blocks where the plan has cells for them.
        """
        return self._remaining

    def cache_bytes(self, images: int = 1, itemsize: int = 2) -> tuple[int, ...]:
        """For each step, the most bytes that the caches hold: `memory(images, itemsize).steps`."""
        return self.memory(images, itemsize).steps

    def memory(self, images: int = 1, itemsize: int | dtype = 2, cache_dtype: CacheDtype = "native") -> memory.Memory:
        """How many bytes the caches hold, and when they hold the most.

        Args:
            images: how many images are generated at once.
            itemsize: the dtype of the activations, or its bytes per element.
            cache_dtype: how entries are encoded, as `apply` takes it. With `cache_device` the bytes are on that device.

        Raises:
            InputsInvalid: there is no such cache dtype.
        """
        return memory.memory(
            self.cells,
            self.target.sites,
            self.tokens,
            self.samples,
            images=images,
            itemsize=itemsize if isinstance(itemsize, int) else itemsize.itemsize,
            calls=self.calls,
            cache_dtype=memory.require_cache_dtype(cache_dtype),
        )

    @property
    def conditions(self) -> Conditions:
        """What the plan's rows and radii were made for."""
        return Conditions(self.steps, self.tokens, self.switch, self.target.levels)

    def resample(
        self,
        steps: int | None = None,
        tokens: Tokens | None = None,
        switch: int | None = None,
        levels: Sequence[float] | None = None,
    ) -> "Plan":
        """Derives the plan for other steps or noise levels, or for other tokens of a call, without a search.

        `apply` does the same when a generation asks for it. Returns the plan itself where nothing changes. A derived plan says
        in `about` that it was derived, and applying it gives a warning. How cells are chosen is in `resample.py`.

        Args:
            steps: the new number of steps; None leaves it as it is.
            tokens: the new tokens of a call; None leaves them as they are.
            switch: the new step in which the second transformer takes over; None keeps the part of the steps before it.
            levels: the noise level of each new step (see `Target.levels`); None: rows are carried over by their place in the
                run.

        Raises:
            InputsInvalid: nothing is given, or a value is none that the plan can have.
        """
        old = self.conditions
        wrong = steps is not None and not (type(steps) is int and steps > 0)
        if levels is not None:
            wrong = wrong or steps not in (None, len(levels)) or not levels
            steps = len(levels)
        if wrong or (steps is None and tokens is None):
            raise InputsInvalid(
                f"got steps={steps!r}, tokens={tokens} and {'no' if levels is None else len(levels)} levels, wanted a number "
                "of steps of at least 1, or a level for each step, or tokens"
            )
        steps = old.steps if steps is None else steps
        known = old.levels if steps == old.steps else None
        if levels is not None:
            known = tuple(levels)
        new = Conditions(steps, tokens or old.tokens, resample.scaled_switch(old, steps) if switch is None else switch, known)
        resample.require_switch(new, old)
        return self.carried_over(new)

    def carried_over(self, new: Conditions) -> "Plan":
        """The plan under other conditions, see `resample`; the plan itself where nothing changes.

        Raises:
            InputsInvalid: the plan cannot be carried over to them.
        """
        old = self.conditions
        cells, new = resample.resampled(self.cells, self.target.sites, self.samples, old, new)
        target = replace(self.target, levels=new.levels)
        found = replace(self, cells=cells, target=target, tokens=new.tokens, switch=new.switch)
        if found == self and new.levels == old.levels:
            return self
        change = old.changes(found.conditions)  # a grid goes where no box is left
        change["module_flops"] = f"{found.flops().module:.3f}, was {self.flops().module:.3f}"
        return replace(found, about={**self.about, "derived": [*self.about.get("derived", ()), change]})

    def begun_at(self, step: int) -> "Plan":
        """The plan of a generation in which nothing that the steps before `step` computed can be read; these are full here."""
        full = ((FULL,) * len(self.target.sites),) * step
        later = resample.that_can_run(self.cells[step:], self.target.sites, None if self.switch is None else self.switch - step)
        return replace(self, cells=full + later)

    def require(self, target: Target, *, scheduler: bool = True) -> None:
        """Check that the plan was made for `target`; with `scheduler=False`, for any scheduler of it.

        Raises:
            PlanMismatch: the plan was made for another target; the message names the first difference, and counts the others.
        """
        if found := self.target.differences(target) if scheduler else self.target.model_differences(target):
            raise PlanMismatch(f"plan does not fit this pipeline; search again on it. {first_of(found)}")

    def require_call(
        self,
        steps: int | None,
        tokens: Tokens,
        calls: int = 1,
        switch: int | None = None,
        levels: tuple[float, ...] | None = None,
    ) -> None:
        """Check that a generation has the plan's steps, noise levels, visual tokens, calls in a step, and switch.

        Any text fits, because text is attended in full.
        `steps` and `levels` are None where they are not known yet.

        Raises:
            PlanMismatch: one of them differs; the message names every difference.
        """
        found = []
        if steps not in (None, self.steps):
            remedy = f"search again with {steps} steps, or with this strength where it starts from an image"
            found.append(f"plan is for {self.steps} steps, pipeline runs {steps}; {remedy}")
        elif not resample.same_levels(levels, self.target.levels):
            found.append(
                "plan is for other noise levels than the pipeline runs at; search again with these sigmas or timesteps"
            )
        tokens = tokens if self.tokens.grid else tokens.flat
        if replace(tokens, text=self.tokens.text) != self.tokens:
            found.append(f"plan is for {self.tokens}, pipeline runs {tokens}; search again at this resolution")
        if switch != self.switch:
            mine, theirs = map(_second_transformer, (self.switch, switch))
            found.append(f"plan has {mine}, pipeline {theirs}; search again with this boundary_ratio")
        if calls != self.calls and self.guided:
            found.append(f"plan is for {self.calls} calls of the transformer a step, pipeline makes {calls}; search again")
        if found:
            raise PlanMismatch("; ".join(found))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON into a file, which `load` reads. A file of this name is replaced, completely or not at all.

        Raises:
            PlanInvalid: the text is longer than `load` reads, or `about` has what JSON has not.
            FileUnwritable: the file cannot be written, or the disk is full.
        """
        about_in_file(self.about, PlanInvalid)
        try:
            limits.require_length(text := self.text())
        except ValueError as error:
            raise PlanInvalid(f"{error}; a plan of fewer steps, or of whole sites, is shorter") from error
        atomic_write.write(path, text.encode())

    def text(self) -> str:
        """The plan as JSON that a person can read: a legend of cells, and one line of symbols for each step."""
        return file_format.write(self)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan that `save` wrote, in this version or an earlier one (formats 2 to 5).

        Raises:
            PlanInvalid: the file cannot be read, is not JSON, not a plan, of an unknown format, contradicts itself, or is
                larger than any real plan (see `limits.py`).
            FileNotFoundError: the file is not there.
        """
        try:
            return cls(**file_format.read(limits.read_bytes(path)))
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:  # also pydantic's ValidationError, and PlanInvalid
            reason = limits.shortened(error)
            raise PlanInvalid(f"{path} is no sound plan: {reason}; wanted a file that Plan.save wrote") from error

    def card(self, name: str) -> Card:
        """What the card of a repository that holds the plan says: what the plan leaves of the FLOPs, and how it was found."""
        search, left = self.about.get("search", {}), self.flops()
        kinds = sorted({site.kind.replace("_", "-") for site in self.target.sites})
        errors = {key: search[key] for key in ("transformer_flops", "predicted_error", "measured_error") if key in search}
        counted = {
            "steps": self.steps,
            "sites": f"{len(self.target.sites)}: {', '.join(kinds)}",
            "cells": ", ".join(f"{kind} {count}" for kind, count in self.count().most_common()),
            "visual tokens": self.tokens.visual,
            "FLOPs left of the modules that the plan speaks of": f"{left.module:.1%}",
        }
        return Card(
            f"A plan for {self.target.transformer}: {self.steps} steps",
            "A plan says what is computed and what is repeated, for every step and module of a diffusion transformer.",
            [f"plan = ah.Plan.from_pretrained({name!r})", "ah.apply(pipe, plan)  # pipe: a pipeline of diffusers"],
            {"transformer": self.target.transformer, "scheduler": self.target.scheduler, **counted, **errors},
            self.about,
        )


def _second_transformer(switch: int | None) -> str:
    return "no second transformer" if switch is None else f"its second transformer from step {switch} on"
