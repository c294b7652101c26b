"""`describe`: an adapter for a custom model, made from one run of it that is watched."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from arrowhead.calibration.describe_sites import Found, TokenLayout, lengths, raw, sites_code
from arrowhead.calibration.watching import Watched, as_batch, watch
from arrowhead.errors import InputsInvalid
from arrowhead.models.custom import Adapter
from arrowhead.models.custom_attention import Attention, AttentionIn, FusedQKV
from arrowhead.models.custom_blocks import Block
from arrowhead.plans.layout import Tokens


@dataclass(frozen=True)
class Description:
    """An adapter that `describe` made.

    Attributes:
        adapter: the adapter.
        code: the Python code that makes it, to be copied and corrected. `print` shows it.
        unknown: what the run could not tell, or only suggested, one sentence each.
    """

    adapter: Adapter
    code: str
    unknown: tuple[str, ...]

    def __str__(self) -> str:
        """The code, with what is not known in comments."""
        lines = [self.code.rstrip(), *(["", "# Not known from the run:"] if self.unknown else [])]
        for text in self.unknown:
            lines += textwrap.wrap(text, 118, initial_indent="# - ", subsequent_indent="#   ")
        return "\n".join(lines)


def describe(model: nn.Module, run: Callable[[], Any]) -> Description:
    """Watches one run of a custom model, and returns an adapter for it.

    The run is a callable that generates once. In its first call of the model, attention is looked for: torch's, a softmax that
    is written out, and functions that are given queries, keys and values. The model is called twice more then, once with other
    latents, to tell visual tokens from text. What the run cannot tell is in the description's `unknown`, such as the guidance
    scale, or which CFG branch comes first; look through it before a search.

    Args:
        model: the module that the loop calls once or twice in each step, in eval mode.
        run: generates once: at least two steps, better with two images of different prompts.

    Returns:
        The description: `print` it to see the code of the adapter, and what is not known.

    Raises:
        InputsInvalid: the run does not call the model with latents, or no attention was seen that an adapter can describe.

    >>> print(ah.describe(model, lambda: sample(model)))
    def tokens(model, call):
        return arrowhead.Tokens.of_grid(1, call["x"].shape[2] // 2, call["x"].shape[3] // 2)
    ...
    """
    if not isinstance(model, nn.Module) or not callable(run):
        raise InputsInvalid(
            f"got a {type(model).__name__} and a {type(run).__name__}, wanted a torch.nn.Module and a "
            "callable that generates once"
        )
    watched = watch(model, run)
    notes: list[str] = []
    cfg = _cfg(watched, notes)
    layout = _token_layout(watched, notes)
    found = sites_code(watched, layout, guided=cfg in ("cond_first", "uncond_first"), notes=notes)
    if not (found.attention or found.functions):
        why = " ".join(dict.fromkeys(notes))
        raise InputsInvalid(
            f"got no self-attention in a {type(model).__name__} that an adapter can describe ({why or 'none was seen'}); "
            "wanted calls of torch's attention, or of a function with queries, keys and values; describe it by hand, with an "
            "arrowhead.Attention that has a forward"
        )
    code = _code(watched, found, cfg, layout)
    named = (Adapter, Attention, AttentionIn, Block, FusedQKV, Tokens)
    space: dict[str, Any] = {"arrowhead": SimpleNamespace(**{each.__name__: each for each in named})}
    exec(code.replace("import arrowhead\n", ""), space)  # the adapter is what the code says
    if cfg is not None:
        notes.append("guidance_scale, which predicted errors of budgets go by: 1.0 is not the loop's; say it.")
    return Description(space["adapter"], code, tuple(dict.fromkeys(notes)))


def _token_layout(watched: Watched, notes: list[str]) -> TokenLayout:
    """The tokens of a sample: on a grid of patches, or the latents' own sequence; and the text beside them."""
    name, latents = next(iter(watched.calls[0])), watched.latents
    each = latents[0] if isinstance(latents, list) else latents[0:1].squeeze(0)  # (C, ..., H, W) or (N, C)
    longest = max((lengths(each)[0] for each in watched.attended), default=0)
    moved = watched.moved
    text_first, text = False, 0
    if moved is not None and not bool(moved.all()):
        visual = int(moved.sum())
        text, text_first = len(moved) - visual, not bool(moved[0])
        if not bool((moved[text:] if text_first else moved[:visual]).all()):
            notes.append(
                "Where text stands: the visual tokens are not in one piece, so `tokens` is wrong; reorder them, or leave it."
            )
    where = f'call["{name}"]' + ("[0]" if isinstance(latents, list) else "")
    shift = 0 if isinstance(latents, list) else 1
    if each.ndim == 2:
        visual, frames = each.shape[0], 1
        grid = f"arrowhead.Tokens({where}.shape[{shift}]"
        notes.append("The grid: a sequence does not say its rows and columns; without them there are no boxes.")
    else:
        patch = _patch(watched.model, each, {longest - text, *([int(moved.sum())] if moved is not None else [])})
        if patch is None:
            notes.append("The size of a patch: none gives the tokens that were seen; correct `tokens`.")
            patch = (1,) * (each.ndim - 1)
        sizes = [size // p for size, p in zip(each.shape[1:], patch, strict=True)]
        frames = sizes[0] if len(sizes) == 3 else 1
        visual = 1
        for size in sizes:
            visual *= size
        first = 1 + shift
        axes = [f"{where}.shape[{first + i}]" + (f" // {p}" if p > 1 else "") for i, p in enumerate(patch)]
        grid = f"arrowhead.Tokens.of_grid({', '.join(axes if len(axes) == 3 else ['1', *axes])}"
    text_code = _text_code(watched, text, text_first, notes)
    return TokenLayout(visual, text, frames, f"{grid}{text_code})")


def _patch(model: nn.Module, latents: Tensor, wanted: set[int]) -> tuple[int, ...] | None:
    """The size of a patch along each axis of latents (C, ..., H, W) by which there are as many tokens as were seen."""
    axes = latents.ndim - 1
    own = getattr(model, "patch_size", None)
    own = (own,) if isinstance(own, int) else tuple(own) if isinstance(own, list | tuple) else ()
    tried = [own] if len(own) == axes else [(1,) * (axes - 2) + (own[-1],) * 2] if own else []
    for patch in [*tried, *((1,) * (axes - 2) + (p, p) for p in (1, 2, 4, 8, 16))]:
        if all(isinstance(p, int) and p > 0 and size % p == 0 for p, size in zip(patch, latents.shape[1:], strict=True)):
            sizes = [size // p for size, p in zip(latents.shape[1:], patch, strict=True)]
            count = torch.Size(sizes).numel()
            if count in wanted or (axes == 3 and {count // sizes[0], sizes[0]} & wanted):
                return patch
    return None


def _text_code(watched: Watched, text: int, text_first: bool, notes: list[str]) -> str:
    """The code for the text's tokens: those of an argument that has as many, at joint attention or at cross-attention."""
    crossed = {keys for queries, keys in map(lengths, watched.attended) if keys != queries}
    wanted = {text} if text else crossed
    length: str | int | None = None
    for name, value in list(watched.calls[0].items())[1:]:
        if isinstance(value, Tensor) and value.ndim in (3, 4) and value.shape[-2] in wanted and value.is_floating_point():
            length = f'call["{name}"].shape[-2]'
            break
    if length is None and len(wanted) == 1 and wanted != {0}:
        (length,) = wanted
        notes.append(f"The text's length: it was {length} tokens, as no argument's length is; say where that comes from.")
    if length is None:
        return ""
    return f", text={length}" + (f", text_first={text_first}" if text else "")


def _cfg(watched: Watched, notes: list[str]) -> str | None:
    """How the branches come: by halves of the latents that are alike, or by calls that follow one another."""
    batches = [as_batch(next(iter(call.values()))) for call in watched.calls]
    first = batches[0]
    assert first is not None
    if len(first) % 2 == 0 and all(batch is not None and torch.equal(*batch.chunk(2)) for batch in batches[:2]):
        half = len(first) // 2
        branches = [_conditions(watched.calls[0], slice(0, half)), _conditions(watched.calls[0], slice(half, 2 * half))]
        order = _unconditional(branches, notes)
        return "uncond_first" if order == 0 else "cond_first"
    second = batches[1] if len(batches) > 1 else None
    if second is not None and first.shape == second.shape and torch.equal(first, second):
        order = _unconditional([_conditions(call, slice(None)) for call in watched.calls[:2]], notes)
        if order == 0:
            notes.append(
                "two_calls wants the conditional call first, and here the unconditional one seems to be; exchange them."
            )
        return "two_calls"
    if len(batches) < 2:
        notes.append("cfg: one call of the model does not tell; say how the branches of guidance come.")
    return None


def _conditions(call: dict[str, Any], rows: slice) -> list[Tensor]:
    """The conditions of some rows of a call: its tensors and lists of tensors but the latents."""
    found = []
    for value in list(call.values())[1:]:
        each = as_batch(value) if isinstance(value, list) else value
        if isinstance(each, Tensor) and each.ndim and len(each) >= (rows.stop or 1):
            found.append(each[rows].double())
    return found


def _unconditional(branches: Sequence[Iterable[Tensor]], notes: list[str]) -> int | None:
    """The branch whose conditions look like none: zeros, or the same for all images where the other's are not."""
    zeros = [[not bool(tensor.any()) for tensor in branch] for branch in branches]
    equal = [[len(tensor) > 1 and bool((tensor == tensor[0]).all()) for tensor in branch] for branch in branches]
    for alike in (zeros, equal):
        different = [(a, b) for a, b in zip(*alike, strict=False) if a != b]
        if different and all(pair == different[0] for pair in different):
            return 0 if different[0][0] else 1
    notes.append("cfg: which of the two branches is the conditional one; the first was taken for it.")
    return None


def _code(watched: Watched, found: Found, cfg: str | None, layout: TokenLayout) -> str:
    attention = "".join(f"        {raw(pattern)}: {text},\n" for pattern, text in found.attention.items())
    lines = ["import arrowhead\n", "\n\ndef tokens(model, call):\n"]
    returned = layout.code
    if found.frames and layout.frames > 1:
        lines.insert(0, "from dataclasses import replace\n\n")
        axis = layout.code.split("of_grid(")[1].split(",")[0] if "of_grid(" in layout.code else str(layout.frames)
        returned = f"replace({layout.code}, frames={axis})"
    lines.append(f"    return {returned}\n\n\nadapter = arrowhead.Adapter(\n")
    if attention:
        lines.append(f"    attention={{\n{attention}    }},\n")
    lines.append("    tokens=tokens,\n")
    lines.append(f"    cfg={cfg!r},\n")
    if found.functions:
        lines.append("    functions=[\n" + "".join(f"        {text},\n" for text in found.functions) + "    ],\n")
    if found.feed_forward:
        lines.append(f"    feed_forward={raw(found.feed_forward)},\n")
    if found.cross_attention:
        crossed = "".join(f"        {raw(pattern)}: {text},\n" for pattern, text in found.cross_attention.items())
        lines.append(f"    cross_attention={{\n{crossed}    }},\n")
    if found.blocks:
        blocks = "".join(f"        {raw(pattern)}: {text},\n" for pattern, text in found.blocks.items())
        lines.append(f"    blocks={{\n{blocks}    }},\n")
    channels = _latent_channels(watched)
    lines.append(f"    latent_channels={channels},\n" if channels else "")
    return "".join([*lines, ")\n"]).replace("'", '"')


def _latent_channels(watched: Watched) -> int | None:
    """The channels of the latents where the output has as many of a variance after them."""
    latents = as_batch(watched.latents)
    out = watched.out[0] if isinstance(watched.out, tuple) else watched.out
    out = as_batch(out)
    if latents is None or out is None or latents.ndim == 3 or out.ndim != latents.ndim:
        return None
    return latents.shape[1] if out.shape[1] == 2 * latents.shape[1] else None
