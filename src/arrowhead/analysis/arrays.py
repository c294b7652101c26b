"""The arrays that an analysis measures, and their file: an npz, with everything that is no array as JSON in it."""

import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from arrowhead.errors import InputsInvalid
from arrowhead.plans import atomic_write, limits
from arrowhead.plans.about import About, about_in_file
from arrowhead.plans.layout import Tokens

Floats = NDArray[np.float32]
FORMAT = 1
BYTES = 5 * 2**30
"""The most bytes of all arrays in a file. A map of 16 heads over 8192 tokens has 4 GiB, and the other arrays of a large video
model a few MiB."""
ARRAYS = ("attention_map", "reuse_errors", "step_similarity", "branch_similarity", "band_mass", "text_mass")
MEMBERS = tuple(f"{name}.npy" for name in ("meta", *ARRAYS))
"""The names of the members of the npz file."""
REUSED = ("output", "window", "residual", "no residual")
"""What a head may reuse in place of its output O = W + R, where W is the window's output and R the residual: O', W' + R, W + R'
and W, in this order. A prime marks the step before."""


@dataclass(frozen=True)
class AttentionMap:
    """Attention weights of some heads of a site in one step, for one image's conditional branch.

    `site` is the site's number, and `tokens` are the tokens it attends over. `weights` are float32 (h, N, N), queries × keys. A
    row sums to 1, or to 0 if all its keys are masked.
    """

    site: int
    step: int
    heads: tuple[int, ...]
    tokens: Tokens
    weights: Floats


@dataclass(frozen=True)
class Analysis:
    """What `ah.analyze` measured in one run of a pipeline with full attention.

    All arrays are float32. An array that was not asked for is None. L is the number of sites, in the order in which they run. H
    is the number of heads of all sites, one site after another. S is the number of steps. Arrays about heads are about the
    image's tokens, before the output projection. All arrays but the attention map are means over images and CFG branches.

    Attributes:
        sites: the paths of the sites, L.
        heads: the number of heads of each site, L.
        steps: the number of denoising steps.
        tokens: the tokens of a sequence that sites attend over; the fewest, where sites differ.
        guided: whether the run had classifier-free guidance.
        radius: the radius of the window, in tokens on each side.
        attention_map: attention weights of some heads of one site in one step.
        reuse_errors: (4, H, S) the relative squared error of a head's output (`metrics.error`) when it is replaced by each of
            `REUSED`. NaN in the first step, except for the last of them.
        step_similarity: (L, S, S) cosine similarity of a site's outputs in two steps, over at most
            `about["analysis"]["sampled"]` of the image's tokens.
        branch_similarity: (L, S) cosine similarity of a site's outputs in the two CFG branches. None without guidance.
        band_mass: (H, S) the fraction of the image's attention on image tokens within the band.
        text_mass: (H, S) the fraction of the image's attention on text. An arrow keeps both.
        about: provenance: pipeline, inputs, seeds, settings and versions.

    Raises:
        InputsInvalid: an array has another shape or dtype, or a number is out of range.

    Example:
        >>> found = ah.analyze(pipe, dict(class_labels=[1, 7], num_inference_steps=50))
        >>> found.save("analysis.npz")
        >>> ah.Analysis.load("analysis.npz").reuse_errors[0]  # AST: the output of the step before, (H, S)
    """

    sites: tuple[str, ...]
    heads: tuple[int, ...]
    steps: int
    tokens: Tokens
    guided: bool
    radius: int
    attention_map: AttentionMap | None = None
    reuse_errors: Floats | None = None
    step_similarity: Floats | None = None
    branch_similarity: Floats | None = None
    band_mass: Floats | None = None
    text_mass: Floats | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._require_numbers()
        layers, heads, steps = len(self.sites), sum(self.heads), self.steps
        shapes: dict[str, tuple[int, ...]] = {
            "reuse_errors": (len(REUSED), heads, steps),
            "step_similarity": (layers, steps, steps),
            "branch_similarity": (layers, steps),
            "band_mass": (heads, steps),
            "text_mass": (heads, steps),
        }
        found = {name: getattr(self, name) for name in shapes}
        if (at := self.attention_map) is not None:
            shapes["attention_map"], found["attention_map"] = (len(at.heads), at.tokens.total, at.tokens.total), at.weights
        for name, array in found.items():
            if array is not None and (array.shape != shapes[name] or array.dtype != np.float32):
                raise InputsInvalid(
                    f"got {name} of shape {array.shape} in {array.dtype}, wanted {shapes[name]} in float32, of {layers} sites, "
                    f"{heads} heads, {steps} steps"
                )

    def _require_numbers(self) -> None:
        if len(self.sites) != len(self.heads) or not self.sites or min(self.heads) < 1 or self.steps < 1 or self.radius < 0:
            raise InputsInvalid(
                f"got {len(self.sites)} sites with heads {self.heads[:8]}, {self.steps} steps and a radius of {self.radius}; "
                "wanted sites with a number of heads each, one step or more, and a radius of 0 or more"
            )
        if (at := self.attention_map) is None:
            return
        here = 0 <= at.site < len(self.sites) and 0 <= at.step < self.steps
        if not here or not at.heads or not all(0 <= head < self.heads[at.site] for head in at.heads):
            raise InputsInvalid(
                f"got a map of heads {at.heads} of site {at.site} in step {at.step}, wanted some of {len(self.sites)} sites in "
                f"{self.steps} steps"
            )

    def of_site(self, site: int) -> slice:
        """The slice of a site's heads in arrays with H heads; `site` is the site's number."""
        first = sum(self.heads[:site])
        return slice(first, first + self.heads[site])

    @property
    def arrays(self) -> dict[str, Floats]:
        """The arrays that are not None, by field; `attention_map` stands for its weights."""
        found = {name: getattr(self, name) for name in ARRAYS}
        if self.attention_map is not None:
            found["attention_map"] = self.attention_map.weights
        return {name: array for name, array in found.items() if array is not None}

    def save(self, path: str | Path) -> None:
        """Write the analysis to an npz file, under exactly this name. An old file is replaced completely or not at all.

        Raises:
            InputsInvalid: `about` is none that `load` reads.
            FileUnwritable: the file cannot be written, or the disk is full.
        """
        at = self.attention_map
        meta = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in {"attention_map", *self.arrays}}
        meta |= {"format": FORMAT, "tokens": asdict(self.tokens), "about": about_in_file(self.about, InputsInvalid)}
        if at is not None:
            meta["map"] = {"site": at.site, "step": at.step, "heads": at.heads, "tokens": asdict(at.tokens)}
        text = np.array(json.dumps(meta, allow_nan=False))
        with atomic_write.replacing(path) as file:  # numpy would append .npz to a path
            np.savez_compressed(file, meta=text, **self.arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> "Analysis":
        """Read an analysis that `save` wrote.

        Raises:
            InputsInvalid: the file cannot be read, or is no analysis.
        """
        try:
            if not Path(path).is_file():
                raise ValueError("no such file")  # a device may have no end, which zipfile looks for
            with zipfile.ZipFile(path) as file:
                arrays = {name: limits.parse_npy(content, name) for name, content in _members(file)}
            text = str(arrays.pop("meta")[()])
            limits.require_length(text)
            limits.parse_json(text)
            meta = _Meta.model_validate_json(text, strict=True)
            return cls(**meta.fields(), **meta.with_map(arrays))
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            EOFError,
            RuntimeError,  # an encrypted member; NotImplementedError is one, too
            zlib.error,
            zipfile.BadZipFile,
        ) as error:
            raise InputsInvalid(
                f"got {path}, which is no analysis ({limits.shortened(error)}); wanted an npz that Analysis.save wrote"
            ) from error

    def as_dict(self) -> dict[str, Any]:
        """A summary for JSON: values by site and step, as medians over heads, without the map and pairs of distant steps."""
        found: dict[str, Any] = {name: getattr(self, name) for name in ("steps", "guided", "radius")}
        found |= {"sites": list(self.sites), "heads": list(self.heads), "tokens": asdict(self.tokens)}
        if self.reuse_errors is not None:
            medians = np.median(self.reuse_errors, 1)
            found["median_reuse_error"] = {name: _rounded(row) for name, row in zip(REUSED, medians, strict=True)}
        if self.step_similarity is not None:
            found["similarity_to_step_before"] = [_rounded(row) for row in self.to_step_before]
        if self.branch_similarity is not None:
            found["branch_similarity"] = [_rounded(row) for row in self.branch_similarity]
        for name, mass in (("band", self.band_mass), ("text", self.text_mass)):
            if mass is not None:
                rows = (np.median(mass[self.of_site(i)], 0) for i in range(len(self.sites)))
                found[f"median_{name}_mass"] = [_rounded(row) for row in rows]
        return {**found, "about": dict(self.about)}

    @property
    def to_step_before(self) -> Floats:
        """Cosine similarity of a site's output to that of the step before: (L, S), NaN in the first step."""
        assert self.step_similarity is not None
        rows = np.diagonal(self.step_similarity, 1, 1, 2)  # (L, S - 1)
        return np.pad(rows, ((0, 0), (1, 0)), constant_values=np.nan)


class _Map(pydantic.BaseModel, extra="forbid"):
    """An attention map without its weights."""

    site: int
    step: int
    heads: tuple[int, ...]
    tokens: Tokens


class _Meta(pydantic.BaseModel, extra="forbid"):
    """An analysis without its arrays, as in the file's JSON."""

    format: Literal[1]
    sites: tuple[str, ...]
    heads: tuple[int, ...]
    steps: int
    tokens: Tokens
    guided: bool
    radius: int
    about: About
    map: _Map | None = None
    reuse_errors: None = None
    step_similarity: None = None
    branch_similarity: None = None
    band_mass: None = None
    text_mass: None = None

    def fields(self) -> dict[str, Any]:
        """The fields of an analysis that are no arrays."""
        return {name: getattr(self, name) for name in ("sites", "heads", "steps", "tokens", "guided", "radius", "about")}

    def with_map(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """The arrays by field, with the weights of the map joined to its description."""
        if self.map is None:
            if "attention_map" in arrays:
                raise ValueError("got an attention map without its site, step and heads")
            return arrays
        rest = {name: array for name, array in arrays.items() if name != "attention_map"}
        at = AttentionMap(self.map.site, self.map.step, self.map.heads, self.map.tokens, arrays["attention_map"])
        return {**rest, "attention_map": at}


def _members(file: zipfile.ZipFile) -> Iterator[tuple[str, bytes]]:
    """The names and contents of an analysis' npy files in a zip. All names and sizes are checked before anything is read.

    Raises:
        ValueError: a member is none of an analysis, comes twice, is compressed unlike numpy does, or all are too large.
    """
    members = file.infolist()
    names = Counter(member.filename for member in members)
    if strange := [name for name, times in names.items() if times > 1 or name not in MEMBERS]:
        raise ValueError(f"got members {strange[:5]}, wanted {', '.join(MEMBERS)}, each once at most")
    if (total := sum(member.file_size for member in members)) > BYTES:
        raise ValueError(f"got {total} bytes of arrays, wanted {BYTES} at most")
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        raise ValueError("got compression of another kind, wanted deflate or none")  # the others are not read in bounds
    for member in members:
        with file.open(member) as content:  # read with a size: without one, more is decompressed than the member says it has
            yield member.filename.removesuffix(".npy"), content.read(member.file_size)


def _rounded(row: Floats) -> list[float | None]:
    """Values with four digits, for JSON; None for NaN and infinity."""
    return [None if not np.isfinite(value) else float(f"{value:.4g}") for value in row]
