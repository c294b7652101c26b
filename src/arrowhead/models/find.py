"""Find the family and the attention sites of a pipeline at hand. Says where attention is, never what to do with it."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from arrowhead.errors import UnsupportedPipeline
from arrowhead.models.conflicts import require_no_conflicts
from arrowhead.models.custom import Attention, CustomModel, Forward, matching, require_apart, tokens_of
from arrowhead.models.families import FAMILIES
from arrowhead.models.family import NONE, Family
from arrowhead.models.head_separation import can_project_heads_separately
from arrowhead.models.model import Model, transformers_of
from arrowhead.models.unsupported import REFUSED
from arrowhead.plans.layout import ALL_KINDS, ATTENTION_KINDS, Kind, Site
from arrowhead.upstream import named_modules, uncompiled

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline

DESCRIBE = "; or describe its transformer with an arrowhead.Adapter, and give that with it in place of the pipeline"
"""What is left where nothing is known."""


def find(pipe: "DiffusionPipeline | CustomModel", kinds: Collection[Kind] = ATTENTION_KINDS) -> Model:
    """Look a pipeline up in the families table and find its sites of these kinds, by default those of attention.

    Raises:
        UnsupportedPipeline: the pipeline or its transformer is not in the table, or no site was found; or the transformer
            carries what no plan goes with, see `beside`.
    """
    if isinstance(pipe, CustomModel):
        require_no_conflicts([pipe.transformer])
        return _custom_model(pipe, kinds)
    transformers = transformers_of(pipe)
    name, supported = type(pipe).__name__, ", ".join(p for f in FAMILIES for p in f.branch_order)
    if not transformers:
        raise UnsupportedPipeline(f"got {name}, which has no transformer; wanted one of {supported}")
    transformer = transformers[0]
    ancestry = {cls.__name__ for cls in type(transformer).__mro__}
    family = next((f for f in FAMILIES if f.transformer in ancestry), None)
    if family is None:
        why = next((f", which has {REFUSED[cls]}" for cls in ancestry if cls in REFUSED), "")
        raise UnsupportedPipeline(
            f"got {name} with a {type(transformer).__name__}{why}; wanted one of {supported}{'' if why else DESCRIBE}"
        )
    _require_alike(family, name, transformers)
    require_no_conflicts(transformers)
    order = next((family.branch_order[c.__name__] for c in type(pipe).__mro__ if c.__name__ in family.branch_order), None)
    if order is None:
        raise UnsupportedPipeline(
            f"got {name}, whose order of CFG branches is not known; wanted one of {', '.join(family.branch_order)}, "
            f"or a subclass of one{DESCRIBE}"
        )
    modules = dict(_sites(family, transformer, kinds))
    if not modules:
        there = ", ".join(sorted({site.kind for site, _ in _sites(family, transformer, ALL_KINDS)})) or "none"
        raise UnsupportedPipeline(
            f"got kinds {', '.join(sorted(kinds))} for a {type(transformer).__name__}, wanted some that it has: {there}"
        )
    return Model(pipe, transformers, family, order, modules)


def _require_alike(family: Family, name: str, transformers: Sequence[Any]) -> None:
    """Check that transformers fit, and that a second one does what the first does, so that sites can be the same."""
    if unfit := family.unfit(transformers[0]):
        raise UnsupportedPipeline(f"got {name} with a {type(transformers[0]).__name__} that has {unfit}; wanted one without")
    if len(transformers) == 1:
        return
    if family.takes_over is None:
        raise UnsupportedPipeline(f"got {name} with a second transformer, wanted one for all steps")
    first, second = ({"class": type(t), **t.config} for t in transformers)
    differences = sorted(key for key in {*first, *second} if key[0] != "_" and first.get(key) != second.get(key))
    if differences:
        raise UnsupportedPipeline(
            f"got {name} with two transformers that differ in {', '.join(differences)}; wanted them alike, so that a plan can "
            "speak of both"
        )


def _custom_model(own: CustomModel, kinds: Collection[Kind]) -> Model:
    """A module of one's own, as its adapter has it.

    Raises:
        UnsupportedPipeline: the adapter's patterns match nothing, or a module's sizes do not follow from its layers.
    """
    adapter, root = own.adapter, uncompiled(own.transformer)
    family = Family(
        name=type(root).__name__,
        transformer=type(root).__name__,
        site_pattern=NONE,
        feed_forward_pattern=adapter.feed_forward,
        block_pattern=NONE,
        branch_order={},
        tokens=partial(tokens_of, adapter),
        guided=lambda _: adapter.cfg is not None,
        guidance_scale=lambda _: adapter.guidance_scale,
    )
    require_apart(adapter, root)
    modules, forwards = dict(_sites(family, root, kinds)), dict[str, Forward]()
    for pattern, attention in adapter.attention.items() if "self_attention" in kinds else ():
        for path in matching(pattern, root):
            module = uncompiled(root.get_submodule(path))
            modules[_custom_site(family, path, module, attention)] = module
            if (instead := attention.replacement_forward()) is not None:
                forwards[path] = instead
    if not modules:
        raise UnsupportedPipeline(f"got kinds {', '.join(sorted(kinds))}, of which the adapter of a {family.name} names none")
    order = {path: place for place, (path, _) in enumerate(named_modules(root))}
    in_order = dict(sorted(modules.items(), key=lambda item: order[item[0].path]))
    return Model(own, (root,), family, adapter.cfg or "cond_first", in_order, forwards)


def _custom_site(family: Family, path: str, module: nn.Module, attention: Attention) -> Site:
    """Its sizes: all that its linear layers multiply is taken for four projections."""
    if attention.replacement_forward() is None and hasattr(module, "processor") and hasattr(module, "to_q"):
        return replace(_site(family, path, module), joint=attention.joint, over=attention.over)
    linears = [*_linears(module).values()]
    heads = attention.head_count(module)
    channels = attention.channels or (linears[0].in_features if linears else 0)
    head_dim = attention.head_dim
    if head_dim is None and channels:
        head_dim, rest = divmod(sum(map(_size, linears)), 4 * channels * heads)
        head_dim = 0 if rest else head_dim
    if not channels or not head_dim:
        raise UnsupportedPipeline(
            f"{path}: got linear layers of a {type(module).__name__} that are not those of Q, K, V and output for {heads} "
            "heads; wanted them, or arrowhead.Attention(head_dim=..., channels=...)"
        )
    return Site(path, heads, head_dim, channels, joint=attention.joint, separable_heads=False, over=attention.over)


def _sites(family: Family, root: nn.Module, kinds: Collection[Kind], prefix: str = "") -> Iterator[tuple[Site, nn.Module]]:
    """What a family's patterns name within a module, in the order of the modules: a block comes before what it contains."""
    makers: dict[Kind, tuple[str, Callable[[Family, str, Any], Site]]] = {
        "self_attention": (family.site_pattern, _site),
        "cross_attention": (family.cross_pattern, _cross_attention),
        "feed_forward": (family.feed_forward_pattern, _feed_forward),
        "block": (family.block_pattern, _block),
    }
    for inner, module in named_modules(root):
        path = f"{prefix}{inner}"
        for kind, (pattern, site) in makers.items():
            if kind in kinds and re.fullmatch(pattern, path):
                yield site(family, path, module), module


def _site(family: Family, path: str, module: Any) -> Site:
    joint = bool(re.fullmatch(family.joint_pattern, path))
    if (inward := getattr(module, "to_qkv_mlp_proj", None)) is not None:
        channels, width = inward.in_features, module.heads * module.head_dim
        weights = _size(inward) + _size(module.to_out) - 4 * channels * width
        return Site(path, module.heads, module.head_dim, channels, joint, separable_heads=False, weights=weights)
    channels, of_text = module.to_q.in_features, getattr(module, "add_k_proj", None) if joint else None
    head_dim = module.to_q.out_features // module.heads
    kv_heads = module.to_k.out_features // head_dim
    return Site(
        path,
        heads=module.heads,
        head_dim=head_dim,
        channels=channels,
        joint=joint,
        projects_out=_projected(module),
        separable_heads=family.separable_heads and can_project_heads_separately(module),
        kv_heads=None if kv_heads == module.heads else kv_heads,
        over=family.over,
        text_channels=0 if of_text is None or of_text.in_features == channels else of_text.in_features,
        by_sample=family.by_sample,
    )


def _projected(module: Any) -> Literal["all", "visual", "none"]:
    if getattr(module, "pre_only", False):
        return "none"
    return "visual" if getattr(module, "context_pre_only", False) else "all"


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


def _cross_attention(_: Family, path: str, module: Any) -> Site:
    of_image, of_text = (sum(map(_size, own)) for own in ((module.to_q, module.to_out[0]), (module.to_k, module.to_v)))
    width, channels = module.to_q.out_features, module.to_q.in_features
    return Site(path, 1, width, channels, separable_heads=False, kind="cross_attention", weights=of_image, text_weights=of_text)


def _block(family: Family, path: str, module: Any) -> Site:
    """What a block multiplies tokens with outside of its sites; its modulation's layers are multiplied once for a whole sample.

    SD3's last block gives no text.
    """
    within = tuple(site for site, _ in _sites(family, module, ALL_KINDS - {"block"}, f"{path}."))
    elsewhere = tuple(f"{site.path}." for site in within)
    own = {
        name: _size(layer)
        for name, layer in _linears(module).items()
        if not (re.fullmatch(family.per_sample_pattern, name) or f"{path}.{name}".startswith(elsewhere))
    }
    of_text = sum(size for name, size in own.items() if re.fullmatch(family.text_pattern, name))
    return Site(
        path,
        heads=1,
        head_dim=within[0].channels,
        channels=within[0].channels,
        joint=any(site.joint for site in within) and not getattr(module, "context_pre_only", False),
        separable_heads=False,
        kind="block",
        weights=sum(own.values()) - of_text,
        text_weights=of_text,
        within=within,
    )


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers within a module, by their paths, as if there were no LoRA, which peft puts around and beside them.

    So a plan fits whether one is loaded or not; what it multiplies counts, if at all, as outside of all sites.
    """
    found = {path: layer for path, layer in named_modules(module) if isinstance(layer, nn.Linear)}
    return {path.removesuffix(".base_layer"): layer for path, layer in found.items() if ".lora_" not in path}


def _size(linear: nn.Linear) -> int:
    return linear.in_features * linear.out_features
