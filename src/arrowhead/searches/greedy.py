"""DiTFastAttn's search (Algorithm 1): step by step and layer by layer, the first candidate that stays under the threshold."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arrowhead.calibration.run import CalibrationRun, SearchResult
from arrowhead.calibration.sharding import share_of
from arrowhead.errors import InputsInvalid
from arrowhead.metrics.error import LossForm, relative_error
from arrowhead.models.find import find
from arrowhead.plans.cells import FULL, Cell, Radius, dit_fast_attn_candidates
from arrowhead.plans.layout import Tokens
from arrowhead.searches.radii import narrower, require_radii

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Greedy:
    """What DiTFastAttn's search may choose from.

    `radii` of the arrows are in tokens on each side, or boxes in the grid. None: an eighth of the visual tokens, the only
    reading that gives the paper's Table 2.
    """

    radii: tuple[Radius, ...] | None = None

    def __post_init__(self) -> None:
        require_radii(self.radii)

    def candidates(self, tokens: Tokens, guided: bool) -> Sequence[Cell]:
        """The cells that are tried, in their order; of several radii the narrower ones first."""
        radii = (tokens.visual // 8,) if self.radii is None else narrower(self.radii, tokens)[::-1]
        return dit_fast_attn_candidates(radii, guided)


@dataclass(frozen=True)
class Trial:
    """One candidate at one site: the transformer's error with it, and the bound it had to stay below.

    `steps` is None where they are those of a loop of one's own.
    """

    step: int
    steps: int | None
    site: str
    cell: Cell
    error: float
    bound: float

    @property
    def accepted(self) -> bool:
        """Whether the candidate was taken."""
        return self.error < self.bound


def greedy_trials(
    pipe: "DiffusionPipeline",
    inputs: Mapping[str, Any],
    *,
    threshold: float,
    loss: LossForm = "paper",
    settings: Greedy = Greedy(),
) -> Generator[Trial, None, SearchResult]:
    """Yield every trial of Algorithm 1 on one run of the pipeline with `inputs`; return what was found.

    A transformer's first step is full. At each later one, on the latents of the compressed trajectory and with the caches
    frozen, the reference is the output with full attention everywhere; at layer i of L, with the cells chosen for the layers
    before, the first candidate of AST, WA-RS + ASC, WA-RS, ASC whose error is below (i / L)·threshold is taken, else full.

    Raises what `arrowhead.search` raises.
    """
    model = find(pipe)
    calibration, share = CalibrationRun(model, inputs), share_of(inputs)
    layers = len(model.sites)
    rows: list[tuple[Cell, ...]] = []
    for step in calibration.steps():
        candidates = {
            site: settings.candidates(site.tokens(calibration.tokens), calibration.branches.guided) for site in model.sites
        }
        chosen: list[Cell] = [FULL] * layers
        if not step.first and threshold > 0:
            reference = share.joined(step.full())
            if not reference.isfinite().all():
                raise InputsInvalid(
                    f"at step {step.index} the transformer gave values that are not finite, with full attention; wanted finite "
                    "ones; use bfloat16 or float32"
                )
            for layer, site in enumerate(model.sites):
                bound = (layer + 1) / layers * threshold
                for cell in candidates[site]:
                    output = share.joined(step.output([*chosen[:layer], cell, *chosen[layer + 1 :]]))
                    error = share.agreed(relative_error(reference, output, loss))
                    trial = Trial(step.index, calibration.step_count, site.path, cell, error, bound)
                    yield trial
                    if trial.accepted:
                        chosen[layer] = cell
                        break
        step.finish(chosen, candidates)
        rows.append(tuple(chosen))
    return calibration.found(rows)
