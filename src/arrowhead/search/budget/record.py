"""The calibration: one run with full attention, in each step of which gradients meet what was computed before."""

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from arrowhead.apply import target_of
from arrowhead.attend import Generation, Passage, bands, count
from arrowhead.cache import Output
from arrowhead.errors import InputsInvalid, NotIntercepted
from arrowhead.intercept import SiteCall
from arrowhead.layout import Branches, Site, Tokens
from arrowhead.lifetimes import Writes
from arrowhead.methods import FULL, Arrow
from arrowhead.models import ATTENTION, EVERYTHING, find
from arrowhead.plan import Target
from arrowhead.route import AttentionCall
from arrowhead.search.about import about
from arrowhead.search.budget.guidance import Guidance
from arrowhead.search.budget.samplers import Sampling, observed
from arrowhead.search.budget.table import Table
from arrowhead.search.calibrate import Calibration, Step

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


PRODUCTS = 64
"""Of each kind in a step, from so many regions of the tokens as that takes: the square of one product tells little, and the
least of many candidates would be those that are underestimated."""


APART = 0x51DE0F7E
"""Added to the vectors' seed, lest they be the very noise that the run began with: seeds of pictures are small numbers."""


@dataclass(frozen=True)
class Extent:
    """How far a calibration looks: arrows of which radii, outputs and residuals of how many steps ago, by how many vectors.

    `radii` None: an eighth, a 16th and a 32nd of the visual tokens. `feed_forward`: whether to look at feed-forwards, too.
    `checkpoint`: blocks run again on the way back rather than keep what they need for it (diffusers' gradient checkpointing):
    half as long again, in a fraction of the memory. `feedback`: from 0, where an error counts for what the sampler makes of it,
    to 1, where it counts for what the model makes of that in the steps that follow, too (the estimate's power).
    `regions`: parts of the sequence of tokens that are looked at on their own, None: as many as make 64 products of each kind.
    The vectors follow from `seed`.
    """

    radii: tuple[int, ...] | None = None
    ages: int = 8
    vectors: int = 1
    feed_forward: bool = True
    checkpoint: bool = False
    feedback: float = 0.5
    regions: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.radii, tuple | list | None):
            raise InputsInvalid(f"got radii={self.radii!r}, wanted a tuple of numbers of tokens, or None")
        if self.radii is not None and not all(type(radius) is int and radius >= 0 for radius in self.radii):
            raise InputsInvalid(f"got radii={self.radii!r}, wanted numbers of tokens, 0 or more")
        if isinstance(self.feedback, bool) or not isinstance(self.feedback, int | float) or not 0 <= self.feedback <= 1:
            raise InputsInvalid(f"got feedback={self.feedback!r}, wanted a number from 0 to 1")
        for name, least in (("ages", 1), ("vectors", 1), ("regions", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is None and name == "regions":
                continue
            if type(value) is not int or value < least:
                raise InputsInvalid(f"got {name}={value!r}, wanted a whole number of {least} or more")

    def bands(self, tokens: Tokens) -> tuple[int, ...]:
        """The radii, widest first; bands that would cover everything are left out."""
        wanted = (tokens.visual // 8, tokens.visual // 16, tokens.visual // 32) if self.radii is None else self.radii
        return tuple(sorted({radius for radius in wanted if radius < tokens.visual - 1}, reverse=True))


@dataclass(frozen=True)
class Recording:
    """What a calibration ends with: the table, the run's final latents, and what it cost, as `Found` says it."""

    table: Table
    final: Tensor
    passes: int
    cost: float


@dataclass(frozen=True)
class _Kept:
    """One step of a site: its heads' output (B, H, N, D), and its residuals (B, H, V, D), one for each radius."""

    output: Tensor
    residuals: tuple[Tensor, ...]


def record(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], extent: Extent) -> Generator[tuple[int, int], None, Recording]:
    """Run the pipeline once with `inputs`, full attention everywhere; yield (step, steps) after each step.

    Every step is one pass forward and one back for each vector, with respect to activations alone. Outputs and residuals of the
    last steps are held for all sites.

    Raises what `arrowhead.search` raises.
    """
    model = find(pipe, EVERYTHING if extent.feed_forward else ATTENTION)
    if any(weight.is_inference() for weight in model.transformer.parameters()):
        raise InputsInvalid(
            "got weights that were made under torch.inference_mode(), through which no gradient goes; wanted others; load the "
            "pipeline outside of it"
        )
    target = target_of(model)
    calibration = Calibration(model, inputs)
    scale = model.family.guidance_scale(model.call_arguments((), inputs)) if calibration.branches.guided else 1.0
    guidance = Guidance(calibration.seen, scale, model.latent_channels)
    recorder: _Recorder | None = None
    with (
        observed(pipe.scheduler) as sampling,
        _parameters_frozen(model.transformer),
        _checkpointed(model.transformer, extent.checkpoint, calibration.branches),
    ):
        for step in calibration.steps():
            recorder = recorder or _Recorder(step.sites, calibration.tokens, guidance, extent)
            recorder.follow(step)
            yield step.index, calibration.step_count
    if recorder is None:
        raise NotIntercepted("the pipeline never called its transformer; wanted at least one denoising step")
    target = target.common(target_of(model))  # some schedulers change settings of their own while they run
    table = recorder.table(sampling, calibration.branches, target, about(pipe, inputs, asdict(extent)))
    return Recording(table, sampling.latents(), calibration.passes, calibration.cost)


class _Recorder:
    """The buffers of the last steps, and the products so far."""

    def __init__(self, sites: Sequence[Site], tokens: Tokens, guidance: Guidance, extent: Extent) -> None:
        self._sites, self._tokens, self._guidance, self._extent = tuple(sites), tokens, guidance, extent
        self._radii = extent.bands(tokens)
        self._generator = torch.Generator()
        self._kept: dict[str, deque[_Kept]] = {site.path: deque(maxlen=extent.ages + 1) for site in sites}
        self._inside: list[FlopCounterMode] = []  # of the sites in the first step
        self._other_flops = 0.0  # of all else, for one image in a step
        self._images = self._regions = 0  # known in the first step
        self._products: list[tuple[Tensor, Tensor]] = []  # of each step, see `Table`

    def follow(self, step: Step) -> None:
        """One step: forward, back, and the products of what comes back with what is kept."""
        probes: dict[str, Tensor] = {}
        self._generator.manual_seed(APART + self._extent.seed)  # the same vectors in every step: what steps do adds up
        counting = flop_counter() if not self._products else nullcontext()  # the first step tells for all
        with ExitStack() as counted:
            whole = counted.enter_context(counting)
            with step.traced(lambda call, state: self._at_site(call, state, probes)) as outputs:
                counted.close()  # before anything goes back
                vectors = self._extent.vectors
                self._images = len(self._guidance.guided([output.detach() for output in outputs]))
                self._regions = self._extent.regions or max(1, PRODUCTS // (self._images * vectors))
                found = [self._of_vector(probes, outputs, last=i == vectors - 1) for i in range(vectors)]
        if whole is not None:
            outside = whole.get_total_flops() - sum(inside.get_total_flops() for inside in self._inside)
            self._other_flops = outside / self._images
        self._products.append((torch.cat([of[0] for of in found], -1), torch.cat([of[1] for of in found], -1)))

    def table(self, sampling: Sampling, branches: Branches, target: Target, about: Mapping[str, Any]) -> Table:
        """All steps together."""
        final = sampling.latents()
        outputs, residuals = zip(*self._products, strict=True)
        return Table(
            target=target,
            tokens=self._tokens,
            branches=branches,
            radii=self._radii,
            ages=self._extent.ages,
            outputs=torch.stack(outputs).float(),
            residuals=torch.stack(residuals).float(),
            gains=sampling.gains(len(outputs), self._images, feedback=self._extent.feedback),
            final=float(final.square().mean()),
            elements=final[0].numel(),
            other_flops=self._other_flops,
            images=self._images,
            regions=self._regions,
            itemsize=next(iter(self._kept.values()))[0].output.itemsize,
            about=about,
        )

    def _at_site(self, call: SiteCall, state: Generation, probes: dict[str, Tensor]) -> Output:
        """The module's output; where its heads' outputs arise, a probe of zeros that gradients come back to."""
        site, tally = call.site, state.tally
        if site.path in probes:
            return self._again(call, probes[site.path])
        tally.passed(site, FULL, state.tokens)
        if site.kind == "feed_forward":
            return self._of_feed_forward(call, state, probes)

        def attention(asked: AttentionCall) -> Tensor:
            out = asked.native()  # (B, H, N, D)
            passage = Passage(call, FULL, Writes(), state, tuple(range(site.heads)))
            count(passage, passage.methods, len(out), "native")
            with torch.no_grad():
                _require_finite(out, call, state)
                self._kept[site.path].appendleft(_Kept(out.detach(), tuple(self._residuals_of(asked, out, passage))))
            probes[site.path] = torch.zeros_like(out, requires_grad=True)
            return out + probes[site.path]

        with self._counted():
            out = call.run(attention)
        tally.projected(site, state.tokens, site.heads, state.branches.samples)
        return out

    def _of_feed_forward(self, call: SiteCall, state: Generation, probes: dict[str, Tensor]) -> Output:
        """As a site of one head, (B, 1, N, C)."""
        with self._counted():
            out = call.run(lambda attention: attention.native())
        if not isinstance(out, Tensor):
            raise NotIntercepted(f"{call.site.path} gave a {type(out).__name__}; wanted a tensor")
        _require_finite(out, call, state)
        self._kept[call.site.path].appendleft(_Kept(out.detach()[:, None], ()))
        probes[call.site.path] = probe = torch.zeros_like(out[:, None], requires_grad=True)
        state.tally.projected(call.site, state.tokens, 1, state.branches.samples)
        return out + probe[:, 0]

    def _again(self, call: SiteCall, probe: Tensor) -> Output:
        """In a checkpointed block, which runs again on the way back."""
        if call.site.kind == "feed_forward":
            out = call.run(lambda attention: attention.native())
            assert isinstance(out, Tensor)
            return out + probe[:, 0]
        return call.run(lambda attention: attention.native() + probe)

    def _counted(self) -> AbstractContextManager[Any]:
        """Around a site: what it multiplies, in the first step."""
        if self._products:
            return nullcontext()
        self._inside.append(flop_counter())
        return self._inside[-1]

    def _residuals_of(self, asked: AttentionCall, out: Tensor, passage: Passage) -> Iterator[Tensor]:
        heads, visual = range(passage.call.site.heads), passage.tokens.visual_slice
        for radius in self._radii:
            band = bands(asked, heads, [radius] * len(heads), slice(None), passage)
            count(passage, [Arrow(radius)] * len(heads), len(band), passage.generation.kernel)
            yield out[:, :, visual] - band[:, :, visual]

    def _of_vector(self, probes: dict[str, Tensor], outputs: Sequence[Tensor], *, last: bool) -> tuple[Tensor, Tensor]:
        """Of all heads of all sites, for a new random vector: (H, ages + 1, pairs, M), (H, radii, ages + 1, pairs, M)."""
        guided = self._guidance.guided([output.detach() for output in outputs])
        vector = torch.randn(guided.shape, generator=self._generator).to(guided.device, guided.dtype)
        cotangents = self._guidance.cotangents(outputs, vector)
        gradients = torch.autograd.grad(outputs, list(probes.values()), cotangents, retain_graph=not last)
        by_site = dict(zip(probes, gradients, strict=True))
        products = [self._of_site(site, by_site[site.path].float()) for site in self._sites]
        return torch.cat([of_outputs for of_outputs, _ in products]), torch.cat([of_residuals for _, of_residuals in products])

    def _of_site(self, site: Site, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Products of the gradient (B, H, N, D), as in `_of_vector`, for the heads of one site."""
        kept, visual = self._kept[site.path], site.tokens(self._tokens).visual_slice
        outputs = self._paired(gradient, [entry.output for entry in kept])  # (H, steps kept, pairs, B · regions)
        now = outputs[:, :1, [0, 1, 1]] if self._guidance.branches.batched else outputs[:, :1]  # of the gradient's own branch
        residuals = [
            self._paired(gradient, [entry.residuals[r] for entry in kept], visual) for r in range(len(kept[0].residuals))
        ]
        found = torch.zeros(1 + len(self._radii), *outputs.shape[:1], self._extent.ages + 1, *outputs.shape[2:])
        for place, products in enumerate((outputs - now, *residuals)):
            found[place, :, : len(kept)] = products
        return found[0], found[1:].transpose(0, 1)

    def _paired(self, gradient: Tensor, sources: Sequence[Tensor], where: slice = slice(None)) -> Tensor:
        """⟨g, source⟩ of each head, image and region, for each pair of branches: (H, sources, pairs, B · regions).

        `where` are the tokens that the sources have, of all that the regions are parts of.
        """
        conditional, other = self._guidance.halves(gradient)
        found = []
        for source in sources:
            from_conditional, from_other = self._guidance.halves(source)
            pairs = [self._product(conditional, from_conditional, where)]
            if other is not None and from_other is not None:
                pairs += [self._product(other, from_other, where), self._product(other, from_conditional, where)]
            found.append(torch.stack(pairs, 1))
        return torch.stack(found, 1)

    def _product(self, gradient: Tensor, source: Tensor, where: slice) -> Tensor:
        """(B, H, N, D) and as much or less of it -> (H, B · regions), in float64 on the CPU: they are alike, and subtracted."""
        of_tokens = gradient.new_zeros(gradient.shape[:3])  # (B, H, N)
        of_tokens[:, :, where] = (gradient[:, :, where] * source.float()).sum(3)
        of_regions = [region.sum(2).T for region in of_tokens.tensor_split(self._regions, 2)]  # each (H, B)
        return torch.stack(of_regions, 2).flatten(1).double().cpu()


def flop_counter() -> FlopCounterMode:
    """PyTorch's, which does not know attention on a CPU by itself."""

    def attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1])

    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _require_finite(out: Tensor, call: SiteCall, state: Generation) -> None:
    if not out.detach().isfinite().all():
        raise InputsInvalid(
            f"at step {state.step} {call.site.path} gave values that are not finite, with full attention; wanted finite ones; "
            "use bfloat16 or float32"
        )


@contextmanager
def _parameters_frozen(module: nn.Module) -> Iterator[None]:
    """No gradients with respect to weights: what they would need is not kept."""
    learnt = [p for p in module.parameters() if p.requires_grad]
    for p in learnt:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learnt:
            p.requires_grad_(True)


@contextmanager
def _checkpointed(transformer: Any, wanted: bool, branches: Branches) -> Iterator[None]:
    before = transformer.is_gradient_checkpointing
    if (wanted or before) and branches.calls == 2:
        raise InputsInvalid(
            "got gradient checkpointing with a pipeline that calls its transformer twice a step, wanted none: the two calls "
            "run side by side here, which cannot be done again; leave it out, or disable it"
        )
    if wanted:
        transformer.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if wanted and not before:
            transformer.disable_gradient_checkpointing()
