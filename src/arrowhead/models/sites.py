"""Makes sites of a transformer's modules: which modules are sites, and which sizes they have."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal

from torch import nn

from arrowhead.errors import UnsupportedPipeline
from arrowhead.models.custom_attention import Attention, AttentionIn
from arrowhead.models.custom_blocks import Block
from arrowhead.models.family import Family
from arrowhead.models.head_separation import can_project_heads_separately, heads_of
from arrowhead.plans.layout import ALL_KINDS, Kind, Site
from arrowhead.upstream import named_modules

APART = "arrowhead.Attention(projections=False, head_dim=...), by which the layers that are there are counted"
"""The remedy where a module does not have the four projections that are counted otherwise."""


def sites_in(family: Family, root: nn.Module, kinds: Collection[Kind], prefix: str = "") -> Iterator[tuple[Site, nn.Module]]:
    """The sites of these kinds in a module, in the order they run, blocks before their parts. `prefix` is the module's path.

    That is the order of its modules, but a feed-forward runs after attention, though JoyImage names it before.
    """
    for _, group in groupby(_sites_in(family, root, kinds, prefix), key=lambda found: found[0].path.rpartition(".")[0]):
        yield from sorted(group, key=lambda found: found[0].kind == "feed_forward")


def _sites_in(family: Family, root: nn.Module, kinds: Collection[Kind], prefix: str) -> Iterator[tuple[Site, nn.Module]]:
    makers: dict[Kind, tuple[str, Callable[[Family, str, Any], Site]]] = {
        "self_attention": (family.site_pattern, _self_attention),
        "cross_attention": (family.cross_pattern, _cross_attention),
        "feed_forward": (family.feed_forward_pattern, _feed_forward),
        "block": (family.block_pattern, _block),
    }
    for inner, module in named_modules(root):
        path = f"{prefix}{inner}"
        for kind, (pattern, make) in makers.items():
            if kind in kinds and re.fullmatch(pattern, path) and not _attends_to_an_image(kind, module):
                yield make(family, path, module), module
    if "stack" in kinds and not prefix and (blocks := stack_blocks(_stack_lists(family, root), root)):
        whole = _stack(family, blocks)
        if whole is not None:
            yield whole, nn.ModuleList(blocks.values())


def stack_blocks(names: Sequence[str], root: nn.Module) -> dict[str, nn.Module]:
    """The blocks in the lists of these names, by their paths, in the order they run."""
    lists = [(name, list_) for name in names if isinstance(list_ := getattr(root, name, None), nn.ModuleList)]
    return {f"{name}.{i}": block for name, list_ in lists for i, block in enumerate(list_)}


def _stack_lists(family: Family, root: nn.Module) -> list[str]:
    """The names of the lists of a stack's blocks, in the order of the transformer's modules."""
    lists = [name for name, module in root.named_children() if isinstance(module, nn.ModuleList)]
    return [name for name in lists if re.fullmatch(family.block_pattern, f"{name}.0") and name in (family.stack or lists)]


def _stack(family: Family, blocks: Mapping[str, nn.Module]) -> Site | None:
    """The site of these blocks as a stack; None where one of them is no site."""
    if not all(re.fullmatch(family.block_pattern, path) and not _attends_to_an_image("block", b) for path, b in blocks.items()):
        return None
    within = tuple(_block(family, path, module) for path, module in blocks.items())
    channels = within[0].channels
    return Site(
        "+".join(dict.fromkeys(path.rpartition(".")[0] for path in blocks)),
        heads=1,
        head_dim=channels,
        channels=channels,
        joint=any(site.joint for site in within[0].within if site.kind == "feed_forward"),  # text and image in one sequence
        separable_heads=False,
        kind="stack",
        within=within,
    )


def _attends_to_an_image(kind: Kind, module: Any) -> bool:
    """Whether it is a cross-attention, or a block with one, that attends to an image besides the text, as in Wan 2.1.

    Its FLOPs do not follow from the tokens of video and text: it is no site.
    """
    attention = module if kind == "cross_attention" else getattr(module, "attn2", None) if kind == "block" else None
    return any(getattr(attention, name, None) is not None for name in ("add_k_proj", "k_img"))


def custom_attention_site(family: Family, path: str, module: nn.Module, attention: Attention) -> Site:
    """The site of a custom model's attention module; all its linear layers together are taken for Q, K, V and output.

    Where the module projects nothing, its linear layers, if any, multiply each token besides.

    Raises:
        UnsupportedPipeline: the linear layers are no four projections of heads, or the number of heads is not known.
    """
    own = attention.replacement_forward() is None and attention.function is None
    if own and hasattr(module, "processor") and hasattr(module, "to_q"):
        return replace(_self_attention(family, path, module), joint=attention.joint, over=attention.over)
    linears, heads, head_dim = [*_linears(module).values()], attention.head_count(module), attention.head_dim
    weights, kind = sum(map(_size, linears)), type(module).__name__
    if not attention.projections:
        assert head_dim is not None  # Attention requires it
        return Site(
            path,
            heads,
            head_dim,
            attention.channels or heads * head_dim,
            joint=attention.joint,
            projects_out="outside",
            separable_heads=False,
            weights=weights,
            over=attention.over,
        )
    channels = attention.channels or (linears[0].in_features if linears else 0)
    if head_dim is None and channels:
        head_dim, rest = divmod(weights, 4 * channels * heads)
        head_dim = 0 if rest else head_dim
    if not channels or not head_dim:
        raise UnsupportedPipeline(
            f"{path}: got linear layers of a {kind} that are not those of Q, K, V and output for {heads} heads; wanted "
            f"them, or {APART}; where these layers are no torch.nn.Linear, arrowhead.Attention(head_dim=..., channels=...)"
        )
    if weights not in (0, 4 * channels * heads * head_dim) or next(module.parameters(), None) is None:
        raise UnsupportedPipeline(
            f"{path}: got a {kind} with {weights} weights in linear layers, wanted {4 * channels * heads * head_dim}, those of "
            f"Q, K, V and output for {heads} heads of {head_dim} and {channels} channels, which FLOPs would count; or {APART}"
        )
    return Site(path, heads, head_dim, channels, joint=attention.joint, separable_heads=False, over=attention.over)


def function_site(path: str, module: nn.Module, function: AttentionIn) -> Site:
    """The site of a function that a module calls for attention. Nothing is projected in it.

    Raises:
        UnsupportedPipeline: the module does not say its heads.
    """
    heads, head_dim = function.sizes(module)
    return Site(
        path,
        heads,
        head_dim,
        channels=heads * head_dim,
        joint=function.joint,
        projects_out="outside",
        separable_heads=False,
        over=function.over,
    )


def custom_cross_attention_site(path: str, module: nn.Module, text: str) -> Site:
    """The site of a custom model's cross-attention; `text`: the layers that multiply the text tokens.

    Raises:
        UnsupportedPipeline: there are no linear layers for the text, or none for the visual tokens.
    """
    layers = _linears(module)
    of_text = [layer for name, layer in layers.items() if re.fullmatch(text, name)]
    visual = [layer for name, layer in layers.items() if not re.fullmatch(text, name)]
    if not of_text or not visual:
        raise UnsupportedPipeline(
            f"{path}: got {text!r:.200} for the layers of a {type(module).__name__} that multiply the text, wanted some of "
            f"{', '.join(layers) or 'its linear layers, of which it has none'}, and not all"
        )
    return Site(
        path,
        heads=1,
        head_dim=visual[0].out_features,
        channels=visual[0].in_features,
        separable_heads=False,
        kind="cross_attention",
        weights=sum(map(_size, visual)),
        text_weights=sum(map(_size, of_text)),
    )


def custom_block_site(path: str, module: nn.Module, block: Block, sites: Iterable[Site]) -> Site:
    """The site of a custom model's block, with those of these sites that lie within it.

    Where both text and visual tokens go on, the weights of the visual tokens count for all, and `text_weights` is what the
    text's own layers have more.

    Raises:
        UnsupportedPipeline: its linear layers do not say its width.
    """
    within = tuple(site for site in sites if site.module_path == path or site.path.startswith(f"{path}."))
    layers, elsewhere = _linears(module), tuple(f"{site.path}." for site in within)
    own = {
        name: _size(layer)
        for name, layer in layers.items()
        if not (re.fullmatch(block.per_sample, name) or f"{path}.{name}".startswith(elsewhere))
    }
    if not within and not own:
        raise UnsupportedPipeline(
            f"{path}: got a {type(module).__name__} without linear layers for a block; wanted a pattern for blocks alone"
        )
    channels = within[0].channels if within else layers[next(iter(own))].in_features
    of_text = [name for name in own if re.fullmatch(block.text, name)]
    text_weights, joint = sum(own[name] for name in of_text), block.gives_text(path, module)
    weights = sum(own.values()) - text_weights
    return Site(
        path,
        heads=1,
        head_dim=channels,
        channels=channels,
        joint=joint,
        separable_heads=False,
        kind="block",
        weights=weights,
        text_weights=max(0, text_weights - weights) if joint and of_text else text_weights,
        within=within,
    )


def _self_attention(family: Family, path: str, module: Any) -> Site:
    joint = bool(re.fullmatch(family.joint_pattern, path))
    if (fused := getattr(module, "to_qkv_mlp_proj", None)) is not None:  # FLUX.2: Q, K, V and the feed-forward in one layer
        channels, width = fused.in_features, module.heads * module.head_dim
        weights = _size(fused) + _size(module.to_out) - 4 * channels * width
        return Site(path, module.heads, module.head_dim, channels, joint, separable_heads=False, weights=weights)
    if (fused := getattr(module, "img_attn_qkv", None)) is not None:  # JoyImage: Q, K and V in one layer, text in another
        return Site(path, module.heads, module.head_dim, fused.in_features, joint, separable_heads=False)
    query, key, _, _ = _projections(module)
    heads = heads_of(module)
    channels, text_projection = query.in_features, getattr(module, "add_k_proj", None) if joint else None
    head_dim = query.out_features // heads
    kv_heads = key.out_features // head_dim
    text_channels = channels if text_projection is None else text_projection.in_features
    return Site(
        path,
        heads=heads,
        head_dim=head_dim,
        channels=channels,
        joint=joint,
        projects_out=_projects_out(module),
        separable_heads=family.separable_heads and can_project_heads_separately(module),
        kv_heads=None if kv_heads == heads else kv_heads,
        weights=_gate(module),
        over=family.over,
        text_channels=0 if text_channels == channels else text_channels,
        by_sample=family.by_sample,
    )


def _gate(module: Any) -> int:
    """The weights of the layer that gates channels, or in LTX-2 whole heads, if there is one."""
    gates = (getattr(module, name, None) for name in ("to_gate", "to_gate_logits"))
    return sum(_size(gate) for gate in gates if gate is not None)


def _projections(module: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear | None]:
    """The layers that project queries, keys, values and the output; Kandinsky gives them other names than diffusers does."""
    if hasattr(module, "to_query"):
        return module.to_query, module.to_key, module.to_value, module.out_layer
    out = getattr(module, "to_out", None)
    last: Any = out[0] if isinstance(out, nn.ModuleList) else out
    return module.to_q, module.to_k, module.to_v, last


def _projects_out(module: Any) -> Literal["all", "visual", "none"]:
    if getattr(module, "pre_only", False) or isinstance(getattr(module, "to_out", None), nn.Identity):
        return "none"
    return "visual" if getattr(module, "context_pre_only", False) else "all"


def _cross_attention(_: Family, path: str, module: Any) -> Site:
    query, key, value, out = _projections(module)
    return Site(
        path,
        heads=1,
        head_dim=query.out_features,
        channels=query.in_features,
        separable_heads=False,
        kind="cross_attention",
        weights=_size(query) + (0 if out is None else _size(out)) + _gate(module),
        text_weights=_size(key) + _size(value),
    )


def _feed_forward(family: Family, path: str, module: nn.Module) -> Site:
    linears = [*_linears(module).values()]
    if not linears:
        raise UnsupportedPipeline(
            f"{path}: got a {type(module).__name__} without linear layers for a feed-forward; wanted a pattern for "
            "feed-forwards alone"
        )
    channels, weights = linears[0].in_features, sum(map(_size, linears))
    joint = bool(re.fullmatch(family.joint_pattern, path))
    return Site(path, 1, channels, channels, joint, separable_heads=False, kind="feed_forward", weights=weights)


def _block(family: Family, path: str, module: Any) -> Site:
    """A block: its weights are those that multiply tokens outside of its sites, without layers that run once for a sample."""
    within = tuple(site for site, _ in sites_in(family, module, ALL_KINDS - {"block"}, f"{path}."))
    elsewhere = tuple(f"{site.path}." for site in within)
    sizes = {
        name: _size(layer)
        for name, layer in _linears(module).items()
        if not (re.fullmatch(family.per_sample_pattern, name) or f"{path}.{name}".startswith(elsewhere))
    }
    text_weights = sum(size for name, size in sizes.items() if re.fullmatch(family.text_pattern, name))
    returns_text = not getattr(module, "context_pre_only", False)  # SD3's last block returns the image alone
    return Site(
        path,
        heads=1,
        head_dim=within[0].channels,
        channels=within[0].channels,
        joint=any(site.joint for site in within) and returns_text,
        separable_heads=False,
        kind="block",
        weights=sum(sizes.values()) - text_weights,
        text_weights=text_weights,
        within=within,
    )


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers within a module, by their paths, without those of a LoRA.

    peft wraps a layer as `base_layer` and puts the LoRA's layers beside it. Sizes do not depend on them, so that a plan fits
    with and without a LoRA; the FLOPs of a LoRA count, if at all, as outside of all sites.
    """
    found = {path: layer for path, layer in named_modules(module) if isinstance(layer, nn.Linear)}
    return {path.removesuffix(".base_layer"): layer for path, layer in found.items() if ".lora_" not in path}


def _size(linear: nn.Linear) -> int:
    return linear.in_features * linear.out_features
