"""`ah.analyze`: measures where attention repeats itself and how local it is, in one run with full attention."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from arrowhead.analysis.arrays import REUSED, Analysis, AttentionMap, Floats
from arrowhead.calibration.driver import driver_of
from arrowhead.calibration.provenance import provenance
from arrowhead.calibration.run import CalibrationRun
from arrowhead.calibration.step import Step, require_finite
from arrowhead.engine.attention_hook import AttentionCall
from arrowhead.engine.cache import Output, compact_output
from arrowhead.engine.execute_site import SitePass, attend_heads
from arrowhead.engine.generation import Generation
from arrowhead.engine.site_calls import SiteCall
from arrowhead.errors import InputsInvalid
from arrowhead.metrics.error import relative_squared_error
from arrowhead.models.find import find
from arrowhead.plans import masks
from arrowhead.plans.cells import Arrow
from arrowhead.plans.layout import Site, Tokens
from arrowhead.searches.radii import fewest

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline

Part = Literal["map", "reuse", "steps", "branches", "locality"]
PARTS: tuple[Part, ...] = get_args(Part)
"""Parts of an analysis: an attention map, errors of reuse, similarity of steps and of branches, and locality."""
WEIGHTS_AT_ONCE = 2**24
"""Attention weights in memory at once, at least those of one query: 64 MiB in float32, and as much for the scores."""


@dataclass(frozen=True)
class _Request:
    """What to measure, with all defaults resolved."""

    parts: frozenset[Part]
    site: Site
    heads: tuple[int, ...]
    step: int
    radius: int
    sampled: int


def analyze(
    pipe: "DiffusionPipeline",
    inputs: Mapping[str, Any],
    *,
    only: Collection[Part] | None = None,
    site: int | str | None = None,
    heads: Sequence[int] = (0,),
    step: int | None = None,
    radius: int | None = None,
    sampled: int = 512,
    progress: bool = True,
) -> Analysis:
    """Measure every attention site of a pipeline in every step of one run with `inputs`.

    Nothing is compressed. Kernels do not return attention weights, so the weights are computed again in float32, in chunks of
    queries. The run holds the last step's output and window (B, H, V, D) of every site on the device. It holds all steps'
    outputs for `sampled` tokens on the CPU.

    Args:
        pipe: a diffusers pipeline of a supported family. Afterwards it is as it was before.
        inputs: the keyword arguments of the pipeline's call.
        only: parts of the analysis: `map`, `reuse`, `steps`, `branches`, `locality`. None for all. `branches` needs guidance.
        site: the site whose attention map is stored, by path or number; None for the middle one.
        heads: the heads of the map.
        step: the step of the map, from 0; None for the middle one.
        radius: the radius of the window, in tokens on each side. None for an eighth of the visual tokens, as in DiTFastAttn, or
            of the tokens of one frame if sites attend within frames.
        sampled: how many of the image's tokens, evenly spaced, are used to compare the outputs of all steps; at least 1.
        progress: show a tqdm bar.

    Returns:
        An `Analysis`, whose arrays can be saved and drawn.

    Raises:
        UnsupportedPipeline: no attention sites are known for this pipeline.
        InputsInvalid: the pipeline's call does not take the inputs, or the run does not have the site, head, step, radius or
            branches asked for. This is known before the first step is measured.
        AlreadyApplied: the pipeline carries a plan.
        NotIntercepted: attention was computed outside of the known sites.

    Example:
        >>> found = ah.analyze(pipe, dict(class_labels=[1, 7], num_inference_steps=50), only=["reuse"])
        >>> found.reuse_errors.shape  # (4, heads, steps)
    """
    model = find(pipe)
    driver = driver_of(pipe, inputs)
    calibration = CalibrationRun(driver, model)
    parts = _parts(only, calibration.branches.guided)
    number = _site_number(model.sites, site)
    _check(model.sites[number], heads, step, radius, sampled)
    observer: _Observer | None = None

    def measure_step(current: Step) -> None:
        nonlocal observer
        if observer is None:
            tokens = fewest(model.sites, calibration.tokens)
            at = _step(step, calibration.step_count or 0, parts), _radius(radius, tokens)
            observer = _Observer(_Request(parts, model.sites[number], tuple(heads), *at, sampled))
            bar.total = calibration.step_count
        current.finish_by(observer.at_site)
        bar.update()

    with tqdm(desc="analyze", unit="step", disable=not progress) as bar:
        calibration.run(measure_step)
    assert observer is not None  # the run had a step
    settings = {"parts": [part for part in PARTS if part in parts], "radius": observer.request.radius, "sampled": sampled}
    return Analysis(
        sites=tuple(s.path for s in calibration.sites),
        heads=tuple(s.heads for s in calibration.sites),
        steps=calibration.step_count or 0,  # never None for a pipeline
        tokens=fewest(model.sites, calibration.tokens),
        guided=calibration.branches.guided,
        radius=observer.request.radius,
        about=provenance(driver, settings, "analysis"),
        **observer.arrays(calibration.sites),
    )


class _Observer:
    """Runs sites untouched, and records what the request asks for, step by step."""

    def __init__(self, request: _Request) -> None:
        self.request = request
        self._before: dict[Site, tuple[Tensor, Tensor]] = {}  # output and window of the last step, (B, H, V, D)
        self._errors: dict[Site, list[Tensor]] = {}  # (4, H)
        self._masses: dict[Site, list[Tensor]] = {}  # band and text, (2, H)
        self._outputs: dict[Site, list[Tensor]] = {}  # (B, sampled, C)
        self._branches: dict[Site, list[float]] = {}
        self._map: tuple[Tokens, Floats] | None = None

    def at_site(self, call: SiteCall, state: Generation) -> Output:
        """Run the site's module untouched, and record its output."""
        site, parts = call.site, self.request.parts
        site_pass = SitePass.full(call, state)
        site_pass.record_pass()
        out = call.run(lambda attention: self._attention(attention, site_pass))
        image = _image_tokens(out, site.tokens(state.tokens))  # (B, V, C)
        if "branches" in parts:
            one, other = image.float().flatten(1).chunk(2)  # (B/2, V·C)
            self._branches.setdefault(site, []).append(float(F.cosine_similarity(one, other).mean()))
        if "steps" in parts:
            count = min(self.request.sampled, image.shape[1])
            tokens = torch.arange(count, device=image.device) * image.shape[1] // count
            self._outputs.setdefault(site, []).append(image[:, tokens].cpu())  # (B, sampled, C)
        return out

    def _attention(self, attention: AttentionCall, site_pass: SitePass) -> Tensor:
        """Compute full attention (B, H, N, D), and record errors, masses and the map."""
        call, state = site_pass.call, site_pass.generation
        site, parts = call.site, self.request.parts
        out = attention.native()  # (B, H, N, D)
        require_finite(out, call, state)
        if attention.causal and parts & {"map", "reuse", "locality"}:
            raise InputsInvalid(
                f"{site.path}: got attention that is causal or drops weights, wanted a mask at most; ask for steps and "
                "branches only"
            )
        if "reuse" in parts:
            self._errors.setdefault(site, []).append(self._reuse_errors(attention, out, site_pass))
        if "locality" in parts:
            masses = _masses(attention, site.tokens(state.tokens), self.request.radius)
            self._masses.setdefault(site, []).append(masses)
        if "map" in parts and (site, state.step) == (self.request.site, self.request.step):
            row = state.branches.conditional(len(out)).start
            self._map = site.tokens(state.tokens), _map(attention, row, self.request.heads)
        return out

    def _reuse_errors(self, attention: AttentionCall, out: Tensor, site_pass: SitePass) -> Tensor:
        """The error of each head with each of `REUSED` in place of its output: (4, H)."""
        site, visual, heads = site_pass.call.site, site_pass.tokens.visual_slice, site_pass.heads
        band = attend_heads(attention, heads, [Arrow(self.request.radius)] * len(heads), slice(None), site_pass)
        now = compact_output(out[:, :, visual]), compact_output(band[:, :, visual])
        before, self._before[site] = self._before.get(site), now  # type: ignore[assignment]
        full, window = (tensor.float() for tensor in self._before[site])
        errors = full.new_full((len(REUSED), len(heads)), torch.nan)
        errors[3] = relative_squared_error(full, window)
        if before is not None:
            old_full, old_window = (tensor.float() for tensor in before)
            replacements = old_full, old_window + (full - window), window + (old_full - old_window)
            for row, other in enumerate(replacements):
                errors[row] = relative_squared_error(full, other)
        return errors.cpu()

    def arrays(self, sites: Sequence[Site]) -> dict[str, Any]:
        """The recorded arrays, by fields of `Analysis`."""
        request, found = self.request, dict[str, Any]()
        if self._map is not None:
            tokens, weights = self._map
            found["attention_map"] = AttentionMap(sites.index(request.site), request.step, request.heads, tokens, weights)
        if "reuse" in request.parts:
            found["reuse_errors"] = _numpy(torch.cat([torch.stack(self._errors[site], -1) for site in sites], 1))
        if "locality" in request.parts:
            masses = torch.cat([torch.stack(self._masses[site], -1) for site in sites], 1)
            found["band_mass"], found["text_mass"] = _numpy(masses)
        if "branches" in request.parts:
            found["branch_similarity"] = np.array([self._branches[site] for site in sites], np.float32)
        if "steps" in request.parts:
            found["step_similarity"] = _numpy(torch.stack([_step_similarity(self._outputs[site]) for site in sites]))
        return found


def _numpy(tensor: Tensor) -> Floats:
    return tensor.float().numpy()


def _image_tokens(out: Output, tokens: Tokens) -> Tensor:
    """A site's output for the image's tokens, (B, V, C)."""
    image = out[0] if isinstance(out, tuple) else out
    assert image is not None
    return image[:, tokens.visual_slice] if image.shape[1] > tokens.visual else image


def _step_similarity(outputs: Sequence[Tensor]) -> Tensor:
    """The cosine similarity of a site's outputs (B, n, C) in all pairs of steps, the mean over samples: (S, S)."""
    rows = F.normalize(torch.stack([out.float().flatten(1) for out in outputs]), dim=-1)  # (S, B, n·C)
    return torch.einsum("sbx,tbx->st", rows, rows) / rows.shape[1]


def _weights(call: AttentionCall, queries: slice, rows: slice = slice(None), heads: Sequence[int] | None = None) -> Tensor:
    """Attention weights of some queries over all keys, (rows, h, q, N), in float32 or wider."""
    chosen = torch.arange(call.q.shape[1]) if heads is None else torch.tensor(heads)
    chosen = chosen.to(call.q.device)
    wide = torch.promote_types(call.q.dtype, torch.float32)
    key_heads = chosen // (call.q.shape[1] // call.k.shape[1])  # several query heads may share one key head
    q, k = call.q[rows][:, chosen][:, :, queries].to(wide), call.k[rows][:, key_heads].to(wide)
    scores = (q * (q.shape[-1] ** -0.5 if call.scale is None else call.scale)) @ k.mT
    if call.mask is not None:
        mask = call.mask[(None,) * (4 - call.mask.ndim)]
        mask = masks.part(masks.part(masks.part(mask, 0, rows), 1, chosen), 2, queries)
        scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)
    return scores.softmax(-1).nan_to_num_()  # a query whose keys are all masked has weights of 0


def _chunks(where: slice, weights: int) -> Iterator[slice]:
    """Slices of queries with at most `WEIGHTS_AT_ONCE` weights, where `weights` are those of one query."""
    length = max(1, WEIGHTS_AT_ONCE // weights)
    for start in range(where.start, where.stop, length):
        yield slice(start, min(start + length, where.stop))


def _masses(call: AttentionCall, tokens: Tokens, radius: int) -> Tensor:
    """The fractions of the image's attention within the band and on text, means over samples and queries: (2, H)."""
    batch, heads, total, _ = call.q.shape
    visual, text = tokens.visual_slice, tokens.text_slice
    found = torch.zeros(2, heads, dtype=torch.float64)
    for queries in _chunks(visual, batch * heads * total):
        weights = _weights(call, queries)  # (B, H, q, N)
        image_queries = range(queries.start - visual.start, queries.stop - visual.start)
        far = ~masks.band(image_queries, range(tokens.visual), radius, weights.device)
        near = weights[..., visual].masked_fill_(far, 0)
        found += torch.stack([part.sum((0, 2, 3)) for part in (near, weights[..., text])]).cpu()
    return found / (batch * tokens.visual)


def _map(call: AttentionCall, row: int, heads: Sequence[int]) -> Floats:
    """The attention weights of some heads for one sample: (h, N, N)."""
    total = call.q.shape[2]
    rows = slice(row, row + 1)
    found = [_weights(call, queries, rows, heads)[0].float().cpu() for queries in _chunks(slice(0, total), len(heads) * total)]
    whole = torch.cat(found, 1)
    return (whole if call.padding is None else whole.masked_fill_(call.padding[row].cpu()[:, None], 0)).numpy()


def _parts(only: Collection[Part] | None, guided: bool) -> frozenset[Part]:
    """The parts to measure; all that the run allows by default."""
    if only is None:
        return frozenset(PARTS) if guided else frozenset(PARTS) - {"branches"}
    words = isinstance(only, tuple | list | set | frozenset) and all(isinstance(part, str) for part in only)
    if not words or not only or not {*only} <= {*PARTS}:
        raise InputsInvalid(f"got only={only!r}, wanted some of {', '.join(PARTS)}")
    if "branches" in only and not guided:
        raise InputsInvalid(
            "got branches to compare in a generation without guidance, which has only the conditional one; wanted a guidance "
            "scale above 1, with a negative prompt where the pipeline asks for one; or leave branches out"
        )
    return frozenset(only)


def _site_number(sites: Sequence[Site], wanted: int | str | None) -> int:
    """The number of a site given by path or number; by default the middle one."""
    paths = [site.path for site in sites]
    if wanted is None:
        return len(paths) // 2
    if isinstance(wanted, str) and wanted in paths:
        return paths.index(wanted)
    if isinstance(wanted, int) and not isinstance(wanted, bool) and 0 <= wanted < len(paths):
        return wanted
    raise InputsInvalid(f"got site={wanted!r}, wanted a number from 0 to {len(paths) - 1}, or a path such as {paths[0]}")


def _check(site: Site, heads: Sequence[int], step: int | None, radius: int | None, sampled: int) -> None:
    """Check what can be checked before the pipeline is called."""
    if not isinstance(heads, Sequence) or not heads or not all(_is_whole(head) and head < site.heads for head in heads):
        raise InputsInvalid(f"got heads={heads!r}, wanted some from 0 to {site.heads - 1}, those of {site.path}")
    for name, value, least in (("step", step, 0), ("radius", radius, 0), ("sampled", sampled, 1)):
        if value is not None and not (_is_whole(value) and value >= least):
            raise InputsInvalid(f"got {name}={value!r}, wanted a whole number, {least} or more")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _step(wanted: int | None, steps: int, parts: Collection[Part]) -> int:
    """The step of the map; by default the middle one."""
    if wanted is not None and wanted >= steps:
        raise InputsInvalid(f"got step={wanted} in a run of {steps}, wanted one from 0 to {steps - 1}")
    if steps < 2 and {*parts} & {"reuse", "steps"}:
        raise InputsInvalid(f"got a run of {steps} step, wanted two or more to compare; or ask for other parts only")
    return steps // 2 if wanted is None else wanted


def _radius(wanted: int | None, tokens: Tokens) -> int:
    """The radius of the window; by default an eighth of the visual tokens."""
    if wanted is not None and wanted >= tokens.visual - 1:
        raise InputsInvalid(
            f"got radius={wanted}, which covers all of {tokens.visual} visual tokens; wanted less than {tokens.visual - 1}"
        )
    return tokens.visual // 8 if wanted is None else wanted
