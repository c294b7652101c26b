"""What an analysis gives: arrays, and what they are of. Saved as npz, with all that is no array as JSON within."""

import io
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from arrowhead.errors import InputsInvalid
from arrowhead.plans import limits
from arrowhead.plans.layout import Tokens

Floats = NDArray[np.float32]
FORMAT = 1
BYTES = 2**32
"""Of one array in a file: a map of 16 heads over 8192 tokens is as large."""
REUSED = ("output", "window", "residual", "no residual")
"""What a head may give for its output O = W + R: O', W' + R, W + R' or W, where ' is of the step before, W is what the window
gives, and R the residual."""


@dataclass(frozen=True)
class AttentionMap:
    """Where some heads of a site look in one step, in one image's conditional branch.

    `tokens` are the site's. `weights` (h, N, N) float32: queries × keys; rows sum to 1, or to 0 where all is masked.
    """

    site: int
    step: int
    heads: tuple[int, ...]
    tokens: Tokens
    weights: Floats


@dataclass(frozen=True)
class Analysis:
    """Arrays from one run of a pipeline with full attention, float32, each None where it was not asked for.

    L are the sites, in the order they run, H the heads of all of them, one site after another, S the steps; `tokens` are those
    of a sequence that sites attend over, `radius` is that of the windows, in tokens on each side. What is said of heads is of
    the image's tokens, before the output projection; all but the map are means over images and CFG branches.

    * `attention_map`: of heads of one site in one step.
    * `reuse_errors` (4, H, S): the relative squared error (`metrics.error`) of a head's output where it is one of `REUSED`. NaN
      in the first step, but for the last.
    * `step_similarity` (L, S, S): cosine similarity of what a site gives in two steps, at `about["analysis"]["sampled"]`
      of the image's tokens at most.
    * `branch_similarity` (L, S): cosine similarity of what it gives the CFG branches. None without guidance.
    * `band_mass`, `text_mass` (H, S): how much of its attention the image spends on itself within the band, and on the text.
      An arrow keeps both.

    Raises:
        InputsInvalid: an array has another shape or type, or a number means nothing.
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
        """Where a site's heads stand among those of all."""
        first = sum(self.heads[:site])
        return slice(first, first + self.heads[site])

    @property
    def arrays(self) -> dict[str, Floats]:
        """The arrays that there are, by the names of their fields; the map's are its weights."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith(("errors", "similarity", "mass"))}
        if self.attention_map is not None:
            found["attention_map"] = self.attention_map.weights
        return {name: array for name, array in found.items() if array is not None}

    def save(self, path: str | Path) -> None:
        """Write an npz."""
        at = self.attention_map
        meta = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in {"attention_map", *self.arrays}}
        meta |= {"format": FORMAT, "tokens": asdict(self.tokens), "about": dict(self.about)}
        if at is not None:
            meta["map"] = {"site": at.site, "step": at.step, "heads": at.heads, "tokens": asdict(at.tokens)}
        with Path(path).open("wb") as file:  # a name would be given another ending
            np.savez_compressed(file, meta=np.array(json.dumps(meta, allow_nan=False)), **self.arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> "Analysis":
        """Read what `save` wrote.

        Raises:
            InputsInvalid: the file is something else.
        """
        try:
            with zipfile.ZipFile(path) as file:
                arrays = {member.filename.removesuffix(".npy"): _array(file, member) for member in file.infolist()}
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
            NotImplementedError,
            zlib.error,
            zipfile.BadZipFile,
        ) as error:
            raise InputsInvalid(
                f"got {path}, which is no analysis ({limits.shortened(error)}); wanted an npz that Analysis.save wrote"
            ) from error

    def as_dict(self) -> dict[str, Any]:
        """What it comes to, for JSON: by site and step, medians over heads; no map, and no similarity of distant steps."""
        found: dict[str, Any] = {name: getattr(self, name) for name in ("steps", "guided", "radius")}
        found |= {"sites": list(self.sites), "heads": list(self.heads), "tokens": asdict(self.tokens)}
        if self.reuse_errors is not None:
            middle = np.median(self.reuse_errors, 1)
            found["median_reuse_error"] = {name: _rounded(row) for name, row in zip(REUSED, middle, strict=True)}
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
        """Similarity of what a site gives to what it gave in the step before: (L, S), NaN in the first."""
        assert self.step_similarity is not None
        rows = np.diagonal(self.step_similarity, 1, 1, 2)  # (L, S - 1)
        return np.pad(rows, ((0, 0), (1, 0)), constant_values=np.nan)


class _Map(pydantic.BaseModel, extra="forbid"):
    """An attention map but for its weights."""

    site: int
    step: int
    heads: tuple[int, ...]
    tokens: Tokens


class _Meta(pydantic.BaseModel, extra="forbid"):
    """All of an analysis but its arrays."""

    format: Literal[1]
    sites: tuple[str, ...]
    heads: tuple[int, ...]
    steps: int
    tokens: Tokens
    guided: bool
    radius: int
    about: dict[str, Any]
    map: _Map | None = None
    reuse_errors: None = None
    step_similarity: None = None
    branch_similarity: None = None
    band_mass: None = None
    text_mass: None = None

    def fields(self) -> dict[str, Any]:
        """Those of an analysis that are no arrays."""
        return {name: getattr(self, name) for name in ("sites", "heads", "steps", "tokens", "guided", "radius", "about")}

    def with_map(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """The arrays, that of the map in its place."""
        if self.map is None:
            if "attention_map" in arrays:
                raise ValueError("got an attention map that nothing is said of")
            return arrays
        rest = {name: array for name, array in arrays.items() if name != "attention_map"}
        at = AttentionMap(self.map.site, self.map.step, self.map.heads, self.map.tokens, arrays["attention_map"])
        return {**rest, "attention_map": at}


def _array(file: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    """An npy within a zip, whose length is what its header says: nothing is allocated for what is not there."""
    if member.file_size > BYTES:
        raise ValueError(f"got {member.file_size} bytes of {member.filename}, wanted {BYTES} at most")
    stream = io.BytesIO(file.read(member))
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"got {member.filename} in another version of npy, wanted 1.0")
    try:
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(stream)
    except (RecursionError, MemoryError, SyntaxError) as error:
        raise ValueError(f"got a header of {member.filename} that is none ({type(error).__name__})") from error
    values = stream.read()
    if dtype.hasobject or not dtype.itemsize or min(shape, default=0) < 0 or dtype.itemsize * math.prod(shape) != len(values):
        raise ValueError(f"got {len(values)} bytes of {member.filename}, wanted {dtype} of shape {shape}")
    return np.frombuffer(values, dtype).reshape(shape, order="F" if columns_first else "C").copy()


def _rounded(row: Floats) -> list[float | None]:
    """Four digits; None for what is not a number, which JSON does not have."""
    return [None if not np.isfinite(value) else float(f"{value:.4g}") for value in row]
