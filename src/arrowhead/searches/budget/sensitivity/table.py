"""A calibration's table: what every kept tensor does to the guided output, per step, site and head; damages follow from it."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from arrowhead.errors import InputsInvalid
from arrowhead.plans import flops, limits
from arrowhead.plans.cells import Cell, Precision, Radius
from arrowhead.plans.layout import Branches, Site, Tokens, outermost, relevant_tokens
from arrowhead.plans.lifetimes import of_head
from arrowhead.plans.target import Target
from arrowhead.searches.budget.solver.states import SiteOutput, site_outputs_of

FORMAT = 6
READABLE = (4, 5, FORMAT)
"""Format 5 is without grids and a second transformer, format 4 without precisions besides; else they mean the same."""
SAME, CROSSED = slice(0, 2), slice(0, 3, 2)
"""Of a guided table's three pairs (gradient's branch, source's branch): (c, c) and (u, u); (c, c) and (u, c)."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """Products of gradients with kept tensors, from one run of a pipeline with full attention.

    In step t, with g the gradient of r·(guided output) with respect to a head's output O_t, for a random r, one for all steps:

    * `outputs` (S, H, ages + 1, pairs, M): ⟨g, O_{t−k} − O_t⟩ for each age k;
    * `residuals` (S, H, radii, ages + 1, pairs, M): ⟨g, R_{t−k}⟩ with R = O − W, the arrow of that radius subtracted.

    * `roundings` (S, H, precisions, ages + 1, pairs, M), of `precisions` other than native, None without any: ⟨g, E_{t−k}⟩ with
      E = O_p − O, full attention of that precision less native. What it changes of an arrow is taken to be the same.

    H counts the heads of all sites, one site after another. The pairs are those of branches that g and what it is multiplied
    with belong to: (c, c), (u, u), (u, c) under guidance, else one. M counts random vectors × images × `regions`, parts of the
    sequence of tokens with a product each. What is older than the run is 0. All float32.

    `gains` are the sampler's, times the model's `answers` to the power `feedback`, see `Sampling.gains`; `final` is the mean
    square of an element of the final latents, of which an image has `elements`. `other_flops` are what the transformer
    multiplies outside of all sites, per image and step. `images` were generated at once, in a dtype of `itemsize` bytes;
    `about` says how. `blocks` lie around sites that are all that they compute: a plan may speak of them instead. From the step
    `switch` on there is a second transformer, and older is what the first one gave.
    """

    target: Target
    tokens: Tokens
    branches: Branches
    radii: tuple[Radius, ...]
    ages: int
    outputs: Tensor
    residuals: Tensor
    gains: tuple[float, ...]
    final: float
    elements: int
    other_flops: float = 0.0
    images: int = 1
    regions: int = 1
    itemsize: int = 4
    answers: tuple[float, ...] = ()
    feedback: float = 1.0
    blocks: tuple[Site, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict, compare=False)
    switch: int | None = None
    precisions: tuple[Precision, ...] = ()
    roundings: Tensor | None = None

    @property
    def steps(self) -> int:
        """Denoising steps."""
        return len(self.gains)

    def answering(self, feedback: float) -> "Table":
        """The same with another power of the model's answers."""
        answers = self.answers or (1.0,) * self.steps
        gains = (gain * answer ** (feedback - self.feedback) for gain, answer in zip(self.gains, answers, strict=True))
        return replace(self, gains=tuple(gains), feedback=feedback)

    def attention_alone(self) -> "Table":
        """The same without sites of other kinds: what they multiply counts among what is outside of all sites.

        Raises:
            InputsInvalid: there are no others.
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
            roundings=None if self.roundings is None else self.roundings[:, heads],
            other_flops=self.other_flops + self._module_flops(outermost(self.target.sites)) - self._module_flops(sites),
            blocks=(),
        )

    def _module_flops(self, sites: Sequence[Site]) -> float:
        samples = self.branches.samples * self.branches.calls
        return flops.full_flops(sites, self.tokens, samples).module

    def heads(self, site: int) -> range:
        """Where a site's heads stand among those of all."""
        first = sum(s.heads for s in self.target.sites[:site])
        return range(first, first + self.target.sites[site].heads)

    @property
    def in_blocks(self) -> tuple[Site, ...]:
        """The sites in the order they run, with the `blocks` in the places of those within them."""

        def outer(site: Site) -> Site:
            return next((block for block in self.blocks if block.contains(site)), site)

        return outermost(dict.fromkeys(map(outer, self.target.sites)))

    def damages(self, columns: Sequence[Sequence[int]], givens: Sequence[SiteOutput]) -> Floats:
        """Expected squared change of the final latents, relative to their square: (S, givens, C).

        A column is some heads of one site that do the same. Errors of different columns, runs and regions are taken as
        independent. In a run, steps that repeat or continue an output, changes are added before they are squared: a step's
        damage is what it adds to the square, at least 0. A run is taken to be all repeats or all lines.

        Raises:
            InputsInvalid: the table does not hold what is given: a radius, a precision, or something as old.
        """
        self._require(givens)
        member = torch.zeros(len(columns), self.outputs.shape[1])
        for c, heads in enumerate(columns):
            member[c, list(heads)] = 1
        columns_of = _Products(
            torch.einsum("ch,shkpm->sckpm", member, self.outputs),
            torch.einsum("ch,shrkpm->scrkpm", member, self.residuals),
            None if self.roundings is None else torch.einsum("ch,shrkpm->scrkpm", member, self.roundings),
        )
        wanted = dict.fromkeys(givens)
        found = {given: harm for given, harm in self._along_runs(columns_of, wanted) if given in wanted}
        return np.stack([found[given] for given in givens], 1)

    def damage(self, columns: Sequence[Sequence[Cell] | None]) -> Floats:
        """What a plan's columns, one for each site, do in each step: (S,). Heads that always do the same err together.

        None for a site that a plan does not speak of, as it speaks of the block around it, or of the sites within.

        Raises:
            InputsInvalid: the columns are not of as many steps and sites, or the table does not hold what they give.
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
                givens = site_outputs_of(cells)
                harm = self.damages([heads], givens)[:, :, 0]
                found += harm[range(self.steps), range(self.steps)]
        return found

    def _require(self, givens: Sequence[SiteOutput]) -> None:
        oldest = max((given.oldest for given in givens), default=0)
        radii = {given.radius for given in givens} - {None, *self.radii}
        precisions = {given.precision for given in givens} - {"native", *self.precisions}
        if oldest > self.ages or radii or precisions:
            raise InputsInvalid(
                f"got ages of up to {oldest}, arrows of radii {sorted(map(str, radii)) or self.radii} and precisions "
                f"{sorted(precisions) or self.precisions}, wanted ages of up to {self.ages}, radii among {self.radii} and "
                f"precisions among {self.precisions}, as the table has; calibrate with a larger extent"
            )

    def _along_runs(self, columns: "_Products", givens: Iterable[SiteOutput]) -> Iterator[tuple[SiteOutput, Floats]]:
        """Each given with its damages (S, C): what it adds to the square of the sum of a run's changes, at least 0."""
        following: dict[SiteOutput | None, list[SiteOutput]] = {}
        pending, seen = list(givens), set(givens)
        while pending:
            given = pending.pop()
            before = given.before()
            following.setdefault(before, []).append(given)
            if before is not None and before not in seen:
                seen.add(before)
                pending.append(before)
        gains = torch.tensor(self.gains, dtype=torch.float64)[:, None, None]
        scale = self.regions / (self.final * self.elements)

        def follow(given: SiteOutput, summed: Tensor, square: Tensor) -> Iterator[tuple[SiteOutput, Floats]]:
            summed = gains * self._change(columns, given) + _a_step_later(summed)  # (S, C, M)
            whole = scale * summed.square().mean(2)
            yield given, (whole - _a_step_later(square)).clamp_min(0).numpy()
            for later in following.get(given, ()):
                yield from follow(later, summed, whole)

        nothing = torch.zeros(self.steps, columns.outputs.shape[1], columns.outputs.shape[-1], dtype=torch.float64)
        for given in following.get(None, ()):
            yield from follow(given, nothing, nothing[:, :, 0])

    def _change(self, columns: "_Products", given: SiteOutput) -> Tensor:
        """Change of r·(guided output), if columns give this instead of full attention's output: (S, C, M)."""
        if given.earlier is not None:  # the line through both, at this step
            weight = given.slope * given.since / given.gap
            later = self._change(columns, given.as_it_was())
            return (1 + weight) * later - weight * self._change(columns, given.earlier)
        pairs = self._pairs(given.share)
        found = columns.outputs[:, :, given.lag, pairs].sum(2)
        if given.precision != "native":
            assert columns.roundings is not None
            found = found + columns.roundings[:, :, self.precisions.index(given.precision), given.lag, pairs].sum(2)
        if given.radius is not None:
            radius = self.radii.index(given.radius)
            found = found - columns.residuals[:, :, radius, given.lag, pairs].sum(2)
            if given.residual_lag is not None:
                pairs = self._pairs(given.share or given.residual_shared)
                found = found + columns.residuals[:, :, radius, given.residual_lag, pairs].sum(2)
        return found

    def _pairs(self, shared: bool) -> slice:
        if not self.branches.guided:
            return slice(0, 1)
        return CROSSED if shared else SAME

    def save(self, path: str | Path) -> None:
        """Write the table as safetensors, with everything else as JSON in the file's header."""
        header = _Header(
            format=FORMAT,
            target=self.target,
            tokens=self.tokens,
            branches=self.branches,
            radii=self.radii,
            ages=self.ages,
            gains=self.gains,
            final=self.final,
            elements=self.elements,
            other_flops=self.other_flops,
            images=self.images,
            regions=self.regions,
            itemsize=self.itemsize,
            answers=self.answers,
            feedback=self.feedback,
            blocks=self.blocks,
            switch=self.switch,
            precisions=self.precisions,
            about=dict(self.about),
        )
        tensors = {name: getattr(self, name).contiguous() for name in _tensors_of(self.precisions)}
        content = json.dumps(header.model_dump(mode="json", by_alias=True), default=str, allow_nan=False)
        save_file(tensors, path, metadata={"arrowhead": content})

    @classmethod
    def load(cls, path: str | Path) -> "Table":
        """Read a table that `save` wrote.

        Raises:
            InputsInvalid: the file is no such table, or contradicts itself.
        """
        try:
            with safe_open(path, "pt") as file:
                content = (file.metadata() or {}).get("arrowhead", "{}")
                limits.require_length(content)
                limits.parse_json(content)
                header = _Header.model_validate_json(content, strict=True)
                tensors = {name: file.get_tensor(name) for name in _tensors_of(header.precisions)}
        except (OSError, SafetensorError, ValueError) as error:  # a ValidationError is a ValueError
            raise InputsInvalid(
                f"{path} is no sound table; wanted a file that Table.save wrote. {limits.shortened(error)}"
            ) from error
        try:
            found = header.faults(tensors)
            limits.require_sizes(len(header.gains), header.tokens, (*header.target.sites, *header.blocks))
        except ValueError as error:
            found = str(error)
        if found:
            raise InputsInvalid(f"{path} is no sound table; wanted a file that Table.save wrote. {found}")
        fields = {name: getattr(header, name) for name in type(header).model_fields if name != "format"}
        return cls(**fields, **tensors)


@dataclass(frozen=True)
class _Products:
    """A table's tensors, of columns in place of heads."""

    outputs: Tensor
    residuals: Tensor
    roundings: Tensor | None


def _tensors_of(precisions: Sequence[Precision]) -> tuple[str, ...]:
    return ("outputs", "residuals", "roundings") if precisions else ("outputs", "residuals")


def _a_step_later(of_steps: Tensor) -> Tensor:
    """(S, …), moved on by one step."""
    return torch.cat([torch.zeros_like(of_steps[:1]), of_steps[:-1]])


class _Header(pydantic.BaseModel, extra="forbid"):
    """All of a table but its tensors."""

    format: int
    target: Target
    tokens: Tokens
    branches: Branches
    radii: tuple[Radius, ...]
    ages: int
    gains: tuple[float, ...]
    final: float
    elements: int
    other_flops: float
    images: int
    regions: int
    itemsize: int
    answers: tuple[float, ...]
    feedback: float
    blocks: tuple[Site, ...]
    switch: int | None = None
    precisions: tuple[Precision, ...] = ()
    about: dict[str, Any]

    def faults(self, tensors: Mapping[str, Tensor]) -> str | None:
        """What does not fit together."""
        if self.format not in READABLE:
            return f"got format {self.format}, wanted {' or '.join(map(str, READABLE))}"
        sizes = {"steps": len(self.gains), "ages": self.ages, "elements": self.elements, "images": self.images}
        sizes |= {"regions": self.regions, "itemsize": self.itemsize, "sites": len(self.target.sites)}
        sizes |= {} if self.switch is None else {"switch + 1": self.switch + 1, "steps - switch": len(self.gains) - self.switch}
        if small := [f"{name} {value}" for name, value in sizes.items() if value < 1]:
            return f"got {', '.join(small)}, wanted at least 1"
        of_tokens = [radius for radius in self.radii if isinstance(radius, int)]
        values, above = (*self.gains, self.other_flops, *of_tokens), (*self.answers, self.final)
        if not all(0 <= value < math.inf for value in values) or not all(0 < value < math.inf for value in above):
            return "got gains, answers, FLOPs, radii or a final square below 0 or not finite"
        if len(self.answers) not in (0, len(self.gains)) or not 0 <= self.feedback <= 1:
            return f"got {len(self.answers)} answers to the power {self.feedback}, wanted one a step, and a power of 0 to 1"
        if strange := [block.path for block in self.blocks if not block.made_of(self.target.sites)]:
            return f"got blocks {', '.join(strange)}, wanted such as compute sites of the table"
        return self._faults_of(tensors)

    def _faults_of(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Where the tensors do not fit the rest, or radii the tokens."""
        if self.tokens.grid is None and not all(isinstance(radius, int) for radius in self.radii):
            return "got boxes for tokens of no grid"
        if not all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values()):
            return "got tensors that are not float32, or not finite"
        if "native" in self.precisions or len(set(self.precisions)) < len(self.precisions):
            return f"got precisions {self.precisions}, wanted others than native, each once"
        heads, pairs = sum(site.heads for site in self.target.sites), 3 if self.branches.guided else 1
        ages, products = self.ages + 1, tensors["outputs"].shape[-1] if tensors["outputs"].ndim == 5 else 0
        if products < 1 or products % self.regions:
            return f"got {products} products of each kind, wanted a multiple of {self.regions} regions"
        shapes = {
            "outputs": (len(self.gains), heads, ages, pairs, products),
            "residuals": (len(self.gains), heads, len(self.radii), ages, pairs, products),
            "roundings": (len(self.gains), heads, len(self.precisions), ages, pairs, products),
        }
        wrong = [
            f"{name} of shape {tuple(tensors[name].shape)}, wanted {shape}"
            for name, shape in shapes.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ]
        return "; ".join(wrong) or None
