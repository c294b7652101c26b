"""The sensitivity table of a calibration run, and the errors of plans that are predicted from it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arrowhead.engine.circumstances import works_on_text
from arrowhead.errors import InputsInvalid
from arrowhead.plans import flops
from arrowhead.plans.about import about_in_file
from arrowhead.plans.cells import Cell, Precision, Radius
from arrowhead.plans.layout import Branches, Site, Tokens, outermost, relevant_tokens
from arrowhead.plans.lifetimes import of_head
from arrowhead.plans.target import Target
from arrowhead.searches.budget.sensitivity.site_outputs import (
    ComputedOutput,
    ExtrapolatedOutput,
    SiteOutput,
    site_outputs_of,
)
from arrowhead.searches.budget.sensitivity.table_file import read_table, write_table

OWN_BRANCHES, SHARED_BRANCH = slice(0, 2), slice(0, 3, 2)
"""Of a guided table's three pairs of branches: (c, c) and (u, u), where each branch has an output; (c, c) and (u, c), where the
conditional branch's output serves both."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """A sensitivity table: what any change of a head's output would do to the guided output, from one calibration run.

    `arrowhead.calibrate` makes it, and `arrowhead.solve`, `sweep` and `search` find plans with it. It can be saved, loaded, and
    solved for other budgets without the model. S steps, H heads of all sites, one site after another.

    In step t let g be the gradient of r·(guided output) with respect to a head's output O_t, for a random vector r that is the
    same in all steps. All that a plan can do to the head is a sum of tensors that the run computed, so that the table holds the
    scalar products of g with these tensors. All are float32, and 0 for what is older than the run:

    * `outputs` (S, H, ages + 1, pairs, M): ⟨g, O_{t−k} − O_t⟩ for each age k.
    * `residuals` (S, H, radii, ages + 1, pairs, M): ⟨g, R_{t−k}⟩ with R = O − W, where W is the arrow of that radius.
    * `quantisation_errors` (S, H, precisions, ages + 1, pairs, M), or None without `precisions`: ⟨g, E_{t−k}⟩ with E = O_p − O,
      full attention of the precision p less native full attention. An arrow of that precision is taken to have the same E.

    Under guidance there are three pairs of CFG branches that g and the other tensor belong to, (c, c), (u, u) and (u, c), else
    one. M counts random vectors × images × `regions`, parts of the sequence of tokens that have a product each.

    The *predicted error* of a plan is the expected squared change of the final latents over their square. It adds up over
    steps and over what is taken as independent: sites, heads that do not do the same, runs of reused steps, and regions. Plans
    report its square root, which is the norm of the change over the norm of the final latents.

    Attributes:
        target: the model that the table was made on.
        tokens: the tokens of a call of the transformer.
        branches: how its CFG branches come.
        radii: of the arrows, widest first.
        ages: how many steps old an output or a residual may be.
        outputs, residuals, quantisation_errors: the products, see above.
        sampler_gains: (S,), the norm of the change of the final latents over that of an error in a step's guided output: what
            the sampler makes of the error, times `model_feedback` to the power `feedback`.
        final: mean square of an element of the final latents.
        elements: how many elements an image's final latents have.
        other_flops: FLOPs of the transformer outside of all sites, per image and step.
        images: how many images were generated at once.
        regions: see above.
        itemsize: bytes of an element of a site's output.
        model_feedback: (S,), what the model makes of a step's error in the steps that follow; () means 1 everywhere.
        feedback: the power of it in `sampler_gains`, from 0 to 1.
        blocks: blocks that compute nothing but recorded sites: a plan may speak of them in place of those sites.
        about: the provenance: how the table was made.
        switch: the step from which on a second transformer computes; None for one transformer. Nothing older is of use to it.
        precisions: those other than native that the table has.
        other_texts: whether prompt and negative prompt had two lengths. Then a site that works on text shares no branches: the
            predicted error of sharing is infinite. FLOPs are those of the longer text.

    Examples:
        >>> table = ah.calibrate(pipe, inputs)
        >>> table.save("table.safetensors")
        >>> plan = ah.solve(ah.Table.load("table.safetensors"), ah.Budget(module_flops=0.4))
    """

    target: Target
    tokens: Tokens
    branches: Branches
    radii: tuple[Radius, ...]
    ages: int
    outputs: Tensor
    residuals: Tensor
    sampler_gains: tuple[float, ...]
    final: float
    elements: int
    other_flops: float = 0.0
    images: int = 1
    regions: int = 1
    itemsize: int = 4
    model_feedback: tuple[float, ...] = ()
    feedback: float = 1.0
    blocks: tuple[Site, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict, compare=False)
    switch: int | None = None
    precisions: tuple[Precision, ...] = ()
    quantisation_errors: Tensor | None = None
    other_texts: bool = False

    @property
    def steps(self) -> int:
        """Denoising steps."""
        return len(self.sampler_gains)

    def with_feedback(self, power: float) -> "Table":
        """The table with another power of the model's feedback in its gains."""
        factors = self.model_feedback or (1.0,) * self.steps
        gains = (gain * factor ** (power - self.feedback) for gain, factor in zip(self.sampler_gains, factors, strict=True))
        return replace(self, sampler_gains=tuple(gains), feedback=power)

    def attention_alone(self) -> "Table":
        """The table of its self-attention sites alone. The FLOPs of the other sites count among `other_flops`.

        Raises:
            InputsInvalid: it has no self-attention sites.
        """
        kept = [i for i, site in enumerate(self.target.sites) if site.kind == "self_attention"]
        if not kept:
            raise InputsInvalid(
                "got a budget of self-attention's FLOPs with a table that has none, wanted transformer_flops; or calibrate "
                "with kinds that hold self_attention"
            )
        heads = [head for i in kept for head in self.heads(i)]
        sites = tuple(self.target.sites[i] for i in kept)
        return replace(
            self,
            target=replace(self.target, sites=sites),
            tokens=relevant_tokens(self.tokens, sites),
            outputs=self.outputs[:, heads],
            residuals=self.residuals[:, heads],
            quantisation_errors=None if self.quantisation_errors is None else self.quantisation_errors[:, heads],
            other_flops=self.other_flops + self._module_flops(outermost(self.target.sites)) - self._module_flops(sites),
            blocks=(),
        )

    def _module_flops(self, sites: Sequence[Site]) -> float:
        samples = self.branches.samples * self.branches.calls
        return flops.full_flops(sites, self.tokens, samples).module

    def heads(self, site: int) -> range:
        """The numbers of a site's heads among the heads of all sites."""
        first = sum(s.heads for s in self.target.sites[:site])
        return range(first, first + self.target.sites[site].heads)

    @property
    def in_blocks(self) -> tuple[Site, ...]:
        """The sites in the order they run, with each of the `blocks` in place of the sites within it."""

        def outer(site: Site) -> Site:
            return next((block for block in self.blocks if block.contains(site)), site)

        return outermost(dict.fromkeys(map(outer, self.target.sites)))

    def predicted_errors(self, columns: Sequence[Sequence[int]], outputs: Sequence[SiteOutput]) -> Floats:
        """The predicted error of each output in each step: (S, outputs, C), see the class.

        A column is some heads of one site that do the same. Errors of different columns, runs and regions are taken as
        independent. In a run of steps that repeat or extrapolate an output, the changes of all its steps are added before they
        are squared. The error of a step is what it adds to the square, at least 0. A run is taken to be of one kind: all of its
        steps repeat, or all extrapolate.

        Raises:
            InputsInvalid: the table has no such radius, precision or age.
        """
        self._require(outputs)
        member = torch.zeros(len(columns), self.outputs.shape[1])
        for c, heads in enumerate(columns):
            member[c, list(heads)] = 1
        of_columns = _Products(
            torch.einsum("ch,shkpm->sckpm", member, self.outputs),
            torch.einsum("ch,shrkpm->scrkpm", member, self.residuals),
            None if self.quantisation_errors is None else torch.einsum("ch,shrkpm->scrkpm", member, self.quantisation_errors),
        )
        wanted = dict.fromkeys(outputs)
        found = {output: error for output, error in self._along_runs(of_columns, wanted) if output in wanted}
        errors = np.stack([found[output] for output in outputs], 1)
        if self.other_texts:
            shared = [any(source.share for source in _sources(output)) for output in outputs]
            of_text = {head for i, site in enumerate(self.target.sites) if works_on_text(site) for head in self.heads(i)}
            errors[:, np.outer(shared, [not of_text.isdisjoint(heads) for heads in columns])] = np.inf
        return errors

    def predicted_error(self, columns: Sequence[Sequence[Cell] | None]) -> Floats:
        """The predicted error of a plan in each step: (S,), see the class. Its columns are one for each site.

        Heads of a site that always do the same are one column of `predicted_errors`. A column is None where the plan does not
        speak of the site, but of the block around it or of the sites within it.

        Raises:
            InputsInvalid: the columns are not of as many steps and sites, or the table does not have what they need.
        """
        lengths, sites = {len(column) for column in columns if column is not None}, len(self.target.sites)
        if len(columns) != sites or lengths != {self.steps}:
            raise InputsInvalid(
                f"got {len(columns)} columns of {sorted(lengths)} steps, wanted {sites} of {self.steps}, as the table has"
            )
        found = np.zeros(self.steps)
        for site, column in enumerate(columns):
            if column is None:
                continue
            alike: dict[tuple[Cell, ...], list[int]] = {}
            for place, head in enumerate(self.heads(site)):
                alike.setdefault(of_head(column, place), []).append(head)
            for cells, heads in alike.items():
                errors = self.predicted_errors([heads], site_outputs_of(cells))[:, :, 0]  # (S, S)
                found += errors.diagonal()
        return found

    def _require(self, outputs: Sequence[SiteOutput]) -> None:
        sources = {source for output in outputs for source in _sources(output)}
        oldest = max((output.oldest for output in outputs), default=0)
        radii = {source.radius for source in sources} - {None, *self.radii}
        precisions = {source.precision for source in sources} - {"native", *self.precisions}
        if oldest > self.ages or radii or precisions:
            raise InputsInvalid(
                f"got ages of up to {oldest}, arrows of radii {sorted(map(str, radii)) or self.radii} and precisions "
                f"{sorted(precisions) or self.precisions}, wanted ages of up to {self.ages}, radii among {self.radii} and "
                f"precisions among {self.precisions}, as the table has; calibrate with a larger extent"
            )

    def _along_runs(self, columns: "_Products", outputs: Iterable[SiteOutput]) -> Iterator[tuple[SiteOutput, Floats]]:
        """Each output, and those that its run gave before it, with its errors (S, C).

        Runs that begin alike form a tree. The sum of a run's changes is passed on from an output to those that follow it.
        """
        following: dict[SiteOutput | None, list[SiteOutput]] = {}
        pending, seen = list(outputs), set(outputs)
        while pending:
            output = pending.pop()
            before = output.before()
            following.setdefault(before, []).append(output)
            if before is not None and before not in seen:
                seen.add(before)
                pending.append(before)
        gains = torch.tensor(self.sampler_gains, dtype=torch.float64)[:, None, None]
        scale = self.regions / (self.final * self.elements)

        def follow(output: SiteOutput, summed: Tensor, square: Tensor) -> Iterator[tuple[SiteOutput, Floats]]:
            summed = gains * self._change(columns, output) + _a_step_later(summed)  # (S, C, M)
            whole = scale * summed.square().mean(2)
            yield output, (whole - _a_step_later(square)).clamp_min(0).numpy()
            for later in following.get(output, ()):
                yield from follow(later, summed, whole)

        nothing = torch.zeros(self.steps, columns.outputs.shape[1], columns.outputs.shape[-1], dtype=torch.float64)
        for output in following.get(None, ()):
            yield from follow(output, nothing, nothing[:, :, 0])

    def _change(self, columns: "_Products", output: SiteOutput) -> Tensor:
        """The change of r·(guided output) if columns give this in place of full attention's output: (S, C, M)."""
        if isinstance(output, ExtrapolatedOutput):
            weight = output.slope * output.since / output.gap
            return (1 + weight) * self._change(columns, output.later) - weight * self._change(columns, output.earlier)
        made, lag, pairs = output.source, output.lag, self._pairs(output.share)
        found = columns.outputs[:, :, lag, pairs].sum(2)
        if made.precision != "native":
            assert columns.quantisation_errors is not None
            found = found + columns.quantisation_errors[:, :, self.precisions.index(made.precision), lag, pairs].sum(2)
        if made.radius is not None:
            radius = self.radii.index(made.radius)
            found = found - columns.residuals[:, :, radius, lag, pairs].sum(2)
            if made.residual is not None:
                pairs = self._pairs(made.share or made.residual.shared)
                found = found + columns.residuals[:, :, radius, lag + made.residual.age, pairs].sum(2)
        return found

    def _pairs(self, shared: bool) -> slice:
        """The pairs of branches to add up."""
        if not self.branches.guided:
            return slice(0, 1)
        return SHARED_BRANCH if shared else OWN_BRANCHES

    def save(self, path: str | Path) -> None:
        """Write the table to a file: safetensors, with everything but the tensors as JSON in its header.

        Raises:
            InputsInvalid: `about` is none that `load` reads.
            FileUnwritable: the file cannot be written, or the disk is full. A file of this name is as it was then.
        """
        write_table(
            path,
            {each.name: getattr(self, each.name) for each in fields(self)}
            | {"about": about_in_file(self.about, InputsInvalid)},
        )

    @classmethod
    def load(cls, path: str | Path) -> "Table":
        """Read a table that `save` wrote.

        Raises:
            InputsInvalid: the file is no such table, or contradicts itself.
        """
        return cls(**read_table(path))


@dataclass(frozen=True)
class _Products:
    """A table's tensors, summed over the heads of each column."""

    outputs: Tensor
    residuals: Tensor
    quantisation_errors: Tensor | None


def _sources(output: SiteOutput) -> tuple[ComputedOutput, ...]:
    """The computed outputs that an output is made of."""
    stored = (output.later, output.earlier) if isinstance(output, ExtrapolatedOutput) else (output,)
    return tuple(each.source for each in stored)


def _a_step_later(of_steps: Tensor) -> Tensor:
    """Values of steps (S, …), each moved to the step after it; 0 in the first step."""
    return torch.cat([torch.zeros_like(of_steps[:1]), of_steps[:-1]])
