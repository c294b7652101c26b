"""DiTFastAttn's search (Algorithm 1): step by step and layer by layer, the first candidate that stays under the threshold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from arrowhead.calibration.driver import Driver
from arrowhead.calibration.run import CalibrationRun
from arrowhead.calibration.search_result import SearchResult
from arrowhead.calibration.step import Step
from arrowhead.errors import InputsInvalid
from arrowhead.metrics.error import LossForm, relative_error
from arrowhead.models.find import find
from arrowhead.plans.cells import FULL, Cell, Radius, dit_fast_attn_candidates
from arrowhead.plans.layout import Tokens
from arrowhead.searches.radii import narrower, require_radii


@dataclass(frozen=True)
class Greedy:
    """The candidates of DiTFastAttn's search (Yuan et al. 2024, Algorithm 1).

    Args:
        radii: of the arrows, in tokens on each side, or boxes in the grid. None: an eighth of the visual tokens, the only
            reading that gives the paper's Table 2.

    Raises:
        InputsInvalid: a radius is neither a number of tokens nor a box.

    >>> arrowhead.search(pipe, inputs, strategy=arrowhead.Greedy(radii=(16, 64)), threshold="D3")
    """

    radii: tuple[Radius, ...] | None = None

    def __post_init__(self) -> None:
        require_radii(self.radii)

    def candidates(self, tokens: Tokens, guided: bool) -> Sequence[Cell]:
        """The cells in the order in which they are tried; of several radii the narrower ones first."""
        radii = (tokens.visual // 8,) if self.radii is None else narrower(self.radii, tokens)[::-1]
        return dit_fast_attn_candidates(radii, guided)


@dataclass(frozen=True)
class Trial:
    """One candidate tried at one site: the error of the transformer's output, and the bound that it had to stay below.

    `steps` are the steps of the run; None for a loop around a custom model.
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


def greedy_search(
    driver: Driver,
    *,
    threshold: float,
    loss: LossForm = "paper",
    settings: Greedy = Greedy(),
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> SearchResult:
    """Run Algorithm 1 on one generation of the driver, and call `on_trial` after every trial; gives what was found.

    A transformer's first step is full. At each later one, on the latents of the compressed trajectory and with the caches
    frozen, the reference is the output with full attention everywhere; at layer i of L, with the cells chosen for the layers
    before, the first candidate of AST, WA-RS + ASC, WA-RS, ASC whose error is below (i / L)·threshold is taken, else full.
    Layers are counted in the order in which sites run.

    Raises what `arrowhead.search` raises.
    """
    calibration, share = CalibrationRun(driver, find(driver.pipe)), driver.share
    rows: list[tuple[Cell, ...]] = []

    def choose(step: Step) -> None:
        sites, tokens = step.sites, calibration.tokens
        candidates = {site: settings.candidates(site.tokens(tokens), step.may_share(site)) for site in sites}
        chosen: list[Cell] = [FULL] * len(sites)
        if not step.first and threshold > 0:
            reference = share.joined(step.full())
            if not reference.isfinite().all():
                raise InputsInvalid(
                    f"at step {step.index} the transformer gave values that are not finite, with full attention; wanted finite "
                    "ones; use bfloat16 or float32"
                )
            for layer, site in enumerate(sites):
                bound = (layer + 1) / len(sites) * threshold
                for cell in candidates[site]:
                    output = share.joined(step.output([*chosen[:layer], cell, *chosen[layer + 1 :]]))
                    error = share.agreed(relative_error(reference, output, loss))
                    trial = Trial(step.index, calibration.step_count, site.path, cell, error, bound)
                    on_trial(trial)
                    if trial.accepted:
                        chosen[layer] = cell
                        break
        step.finish(chosen, candidates)
        rows.append(tuple(chosen))

    calibration.run(choose)
    return calibration.found(rows)
