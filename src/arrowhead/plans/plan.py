"""A plan: for every denoising step and attention site, the cell that runs there. Read, written and checked here."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import dtype

from arrowhead.errors import PlanInvalid, PlanMismatch
from arrowhead.plans import file_format, flops, limits, memory, resample
from arrowhead.plans.cells import (
    Attend,
    Cell,
    Full,
    Reuse,
    in_box,
    method_name,
    paper_name,
)
from arrowhead.plans.layout import Tokens, outermost
from arrowhead.plans.lifetimes import first_fault
from arrowhead.plans.memory import CacheDtype
from arrowhead.plans.target import Target


@dataclass(frozen=True)
class Plan:
    """Steps × sites of cells, with what they were made for and how they were found.

    `guided` says whether there were both CFG branches, in one batch or in two `calls` of the transformer a step; `about` holds
    the search's settings, the model's name and the versions of the libraries, for people to read. From the step `switch` on a
    second transformer is called, whose sites are the same and remember nothing of the first one's; None where there is one.
    A plan without boxes is bound to no grid: its `tokens` have none.

    Raises:
        PlanInvalid: rows of different length, or a cell that reads what no earlier step wrote, with the same transformer.
    """

    cells: tuple[tuple[Cell, ...], ...]
    target: Target
    tokens: Tokens
    guided: bool
    about: Mapping[str, Any] = field(default_factory=dict, compare=False)
    calls: int = 1
    switch: int | None = None

    def __post_init__(self) -> None:
        self._require_types()
        cells = {cell for row in self.cells for cell in row if isinstance(cell, Attend)}
        if not any(in_box(method) for cell in cells for method in cell.methods(1)):
            object.__setattr__(self, "tokens", self.tokens.flat)
        elif self.tokens.grid is None:
            raise PlanInvalid(
                f"got boxes for {self.tokens}, whose grid is not known; wanted tokens of a known grid; take radii in tokens"
            )
        if self.switch is not None and not 0 <= self.switch < len(self.cells):
            raise PlanInvalid(f"got switch={self.switch} with {len(self.cells)} steps, wanted one of them, or None")
        if self.calls not in (1, 2) or (self.calls == 2 and not self.guided):
            raise PlanInvalid(f"got {self.calls} calls a step, wanted 1, or 2 where there is guidance")
        if not self.cells or not self.target.sites:
            raise PlanInvalid(f"got {len(self.cells)} steps and {len(self.target.sites)} sites, wanted at least one each")
        if beneath := set(self.target.sites) - set(outermost(self.target.sites)):
            path = min(site.path for site in beneath)
            raise PlanInvalid(f"got site {path} and the block that it lies within, wanted one of the two; leave one out")
        for step, row in enumerate(self.cells):
            if len(row) != len(self.target.sites):
                raise PlanInvalid(f"step {step} has {len(row)} cells, wanted one for each of {len(self.target.sites)} sites")
        for site, column in zip(self.target.sites, self.columns, strict=True):
            told_apart = {len(c.method) for c in column if isinstance(c, Attend) and isinstance(c.method, tuple)}
            if site.kind != "self_attention" and any(isinstance(c, Attend) and c.method != Full() for c in column):
                raise PlanInvalid(f"site {site.path}: a {site.kind} has no heads; wanted it computed in full, or reused")
            if wrong := told_apart - {site.heads}:
                raise PlanInvalid(f"site {site.path} has {site.heads} heads, got methods for {min(wrong)}; wanted one for each")
            if fault := first_fault(column, self.switch):
                again = f", and again at step {self.switch}, where another transformer takes over" if self.switch else ""
                raise PlanInvalid(f"site {site.path}: {fault}; begin with full attention there{again}")

    def _require_types(self) -> None:
        rows = self.cells if isinstance(self.cells, tuple) else (None,)
        if not all(isinstance(row, tuple) and all(isinstance(cell, Attend | Reuse) for cell in row) for row in rows):
            raise PlanInvalid("got cells of something else, wanted a tuple of tuples, steps × sites, of Attend and Reuse")
        kinds = {"target": Target, "tokens": Tokens, "about": Mapping, "guided": bool, "calls": int, "switch": int | None}
        if wrong := [name for name, kind in kinds.items() if not isinstance(getattr(self, name), kind)]:
            found = {name: type(getattr(self, name)).__name__ for name in wrong}
            raise PlanInvalid(f"got {found}, wanted {', '.join(f'{name}: {kinds[name]}' for name in wrong)}")

    @property
    def steps(self) -> int:
        """Denoising steps."""
        return len(self.cells)

    @property
    def columns(self) -> tuple[tuple[Cell, ...], ...]:
        """The cells of each site over the steps."""
        return tuple(zip(*self.cells, strict=True))

    @property
    def samples(self) -> int:
        """Transformer samples per image and step: 2 with both CFG branches."""
        return 2 if self.guided else 1

    def count_heads(self) -> Counter[str]:
        """How many heads do what, by the papers' names, over all steps and attention sites."""
        count: Counter[str] = Counter()
        for row in self.cells:
            for site, cell in zip(self.target.sites, row, strict=True):
                if site.kind != "self_attention":
                    continue
                methods = cell.methods(site.heads) if isinstance(cell, Attend) else ()
                count.update([method_name(method) for method in methods] or {paper_name(cell): site.heads})
        return count

    def count(self) -> Counter[str]:
        """How many cells bear each of the papers' names."""
        return Counter(paper_name(cell) for row in self.cells for cell in row)

    def flops(self) -> flops.Flops:
        """Fractions of the uncompressed run's FLOPs that remain, residual steps included.

        `.attention` counts the two matmuls of self-attention, `.module` all that the plan's sites multiply: the Q, K, V and
        output projections, too, and cross-attention, feed-forwards and blocks where the plan speaks of them.
        """
        return flops.remaining_flops(self.cells, self.target.sites, self.tokens, self.samples)

    def cache_bytes(self, images: int = 1, itemsize: int = 2) -> tuple[int, ...]:
        """The most bytes that the caches hold in each step, for `images` at once in a dtype of `itemsize` bytes."""
        return self.memory(images, itemsize).steps

    def memory(self, images: int = 1, itemsize: int | dtype = 2, cache_dtype: CacheDtype = "native") -> memory.Memory:
        """The bytes that the caches hold, for `images` at once, in activations of a dtype, or of so many bytes each.

        `cache_dtype` as `apply` takes it; with `cache_device` these are bytes on that device.

        Raises:
            InputsInvalid: there is no such dtype.
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

    def resample(self, steps: int | None = None, tokens: Tokens | None = None, switch: int | None = None) -> "Plan":
        """The plan for another number of steps, or for other tokens of a call, without a search: see `resample.py`.

        It says in `about` that it was derived, and is warned of where it is applied; itself where nothing changes. `switch` is
        the step in which the second transformer takes over; None: after the same part of the steps.

        Raises:
            InputsInvalid: nothing is asked for, or what no plan can have; or tokens of another kind than the plan's.
        """
        sites, was = self.target.sites, resample.Circumstances(self.steps, self.tokens, self.switch)
        cells, asked = resample.derived(self.cells, sites, self.samples, was, steps, tokens, switch)
        found = replace(self, cells=cells, tokens=asked.tokens, switch=asked.switch)
        if found == self:
            return self
        flops = [f"{plan.flops().module:.3f}" for plan in (found, self)]
        change = {**was.changes(replace(asked, tokens=found.tokens)), "module_flops": "{}, was {}".format(*flops)}
        return replace(found, about={**self.about, "derived": [*self.about.get("derived", ()), change]})

    def require(self, target: Target) -> None:
        """Check that the plan was made for `target`.

        Raises:
            PlanMismatch: it was not; the message names every difference.
        """
        if found := self.target.differences(target):
            raise PlanMismatch("plan does not fit this pipeline; search again on it. " + "; ".join(found))

    def require_call(self, steps: int | None, tokens: Tokens, calls: int = 1, switch: int | None = None) -> None:
        """Check that a generation has the plan's steps, tokens and switch, and as many calls of the transformer in a step.

        `steps` None: nobody knows yet.

        Raises:
            PlanMismatch: it has not; the message names every difference.
        """
        found = []
        if steps not in (None, self.steps):
            remedy = f"search again with {steps} steps, or with this strength where it starts from an image"
            found.append(f"plan is for {self.steps} steps, pipeline runs {steps}; {remedy}")
        if (tokens if self.tokens.grid else tokens.flat) != self.tokens:
            found.append(f"plan is for {self.tokens}, pipeline runs {tokens}; search again at this resolution")
        if switch != self.switch:
            found.append(f"plan has {_second(self.switch)}, pipeline {_second(switch)}; search again with this boundary_ratio")
        if calls != self.calls and self.guided:
            found.append(f"plan is for {self.calls} calls of the transformer a step, pipeline makes {calls}; search again")
        if found:
            raise PlanMismatch("; ".join(found))

    def save(self, path: str | Path) -> None:
        """Write the plan's text into a file.

        Raises:
            PlanInvalid: it is larger than `load` reads.
        """
        try:
            limits.require_length(text := self.text())
        except ValueError as error:
            raise PlanInvalid(f"{error}; a plan of fewer steps, or of whole sites, is shorter") from error
        Path(path).write_text(text)

    def text(self) -> str:
        """The plan as JSON that a person can read: a legend of cells, and a line of symbols for each step."""
        return file_format.write(self)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan that `save` wrote.

        Raises:
            PlanInvalid: the file is not JSON, not a plan, of another format version, contradicts itself, or is larger than
                anything real, see `files`.
            OSError: it is not there, or may not be read.
        """
        try:
            return cls(**file_format.read(limits.content(path)))
        except ValueError as error:  # a ValidationError, or PlanInvalid, is one
            raise PlanInvalid(f"{path} is no sound plan; wanted a file that Plan.save wrote. {limits.short(error)}") from error


def _second(switch: int | None) -> str:
    return "no second transformer" if switch is None else f"its second transformer from step {switch} on"
