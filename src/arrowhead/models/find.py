"""Find the family and the attention sites of a pipeline at hand. Says where attention is, never what to do with it."""

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from arrowhead.errors import InputsInvalid, UnsupportedPipeline
from arrowhead.layout import Branches, BranchOrder, Kind, Site, Tokens, seen
from arrowhead.models.families import FAMILIES
from arrowhead.models.family import Family
from arrowhead.models.refused import REFUSED
from arrowhead.project import heads_apart

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


ATTENTION: frozenset[Kind] = frozenset({"self_attention"})
EVERYTHING: frozenset[Kind] = frozenset({"self_attention", "cross_attention", "feed_forward", "block"})


@dataclass(frozen=True)
class Model:
    """A pipeline's transformer, its family, and its sites with their modules in the order they run."""

    pipe: "DiffusionPipeline"
    transformer: nn.Module
    family: Family
    branch_order: BranchOrder
    modules: Mapping[Site, nn.Module]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites in the order they run."""
        return tuple(self.modules)

    @property
    def steps(self) -> int:
        """The denoising steps of the call that is running; one that starts from an image leaves the first ones out."""
        return len(self.pipe.scheduler.timesteps) - (getattr(self.pipe.scheduler, "begin_index", None) or 0)

    @property
    def latent_channels(self) -> int:
        """Channels of what the transformer takes as its input."""
        config: Any = self.transformer.config
        return int(config.in_channels)

    def only(self, wanted: Callable[[Site], bool]) -> "Model":
        """The same with fewer sites."""
        return replace(self, modules={site: module for site, module in self.modules.items() if wanted(site)})

    def beside(self, sites: Collection[Site]) -> "Model":
        """The same without what a plan for these sites cannot speak of: blocks around them, and what is within its blocks."""

        def apart(site: Site) -> bool:
            return not any(other.contains(site) or site.contains(other) for other in sites)

        return self.only(apart)

    def call_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The pipeline call's arguments by name, defaults included.

        Raises:
            InputsInvalid: the pipeline's call does not take them.
        """
        name = type(self.pipe).__name__
        return _by_name(inspect.signature(self.pipe.__call__), args, kwargs, name)

    def transformer_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The transformer call's arguments by name, defaults included, as the family's class names them."""
        known: Any = next(c for c in type(self.transformer).__mro__ if c.__name__ == self.family.transformer)
        return _by_name(inspect.signature(known.forward), (self.transformer, *args), kwargs, "the transformer")

    def tokens(self, arguments: Mapping[str, Any]) -> Tokens:
        """What a call of the transformer with these `transformer_arguments` brings that matters to the sites."""
        return seen(self.family.tokens(self.transformer, arguments), self.sites)

    def samples(self, arguments: Mapping[str, Any]) -> int:
        """How many samples such a call has."""
        return len(arguments[self.family.samples])

    def branches(self, call: Mapping[str, Any]) -> Branches:
        """How the CFG branches of a pipeline call with these arguments arrive.

        Raises:
            InputsInvalid: the call asks for what cannot be compressed.
        """
        if refused := self.family.refused(call):
            raise InputsInvalid(f"got {refused}; wanted a call without it; leave it out, or remove the plan")
        return Branches(self.branch_order, self.family.guided(dict(self.pipe.config) | dict(call)))


def find(pipe: "DiffusionPipeline", kinds: Collection[Kind] = ATTENTION) -> Model:
    """Look a pipeline up in the families table and find its sites of these kinds, by default those of attention.

    Raises:
        UnsupportedPipeline: the pipeline or its transformer is not in the table, or no site was found.
    """
    transformer = getattr(pipe, "transformer", None)
    name, supported = type(pipe).__name__, ", ".join(p for f in FAMILIES for p in f.branch_order)
    if not isinstance(transformer, nn.Module):
        raise UnsupportedPipeline(f"got {name}, which has no transformer; wanted one of {supported}")
    ancestry = {cls.__name__ for cls in type(transformer).__mro__}
    family = next((f for f in FAMILIES if f.transformer in ancestry), None)
    if family is None:
        why = next((f", which has {REFUSED[cls]}" for cls in ancestry if cls in REFUSED), "")
        raise UnsupportedPipeline(f"got {name} with a {type(transformer).__name__}{why}; wanted one of {supported}")
    if getattr(pipe, "transformer_2", None) is not None:
        raise UnsupportedPipeline(
            f"got {name} with a second transformer, which takes over in the middle; wanted one transformer for all steps"
        )
    order = next((family.branch_order[c.__name__] for c in type(pipe).__mro__ if c.__name__ in family.branch_order), None)
    if order is None:
        raise UnsupportedPipeline(
            f"got {name}, whose order of CFG branches is not known; wanted one of {', '.join(family.branch_order)}, "
            f"or a subclass of one"
        )
    modules = dict(_sites(family, transformer, kinds))
    if not modules:
        there = ", ".join(sorted({site.kind for site, _ in _sites(family, transformer, EVERYTHING)})) or "none"
        raise UnsupportedPipeline(
            f"got kinds {', '.join(sorted(kinds))} for a {type(transformer).__name__}, wanted some that it has: {there}"
        )
    return Model(pipe, transformer, family, order, modules)


def _sites(family: Family, root: nn.Module, kinds: Collection[Kind], prefix: str = "") -> Iterator[tuple[Site, nn.Module]]:
    """What a family's patterns name within a module, in the order of the modules: a block comes before what it contains."""
    makers: dict[Kind, tuple[str, Callable[[Family, str, Any], Site]]] = {
        "self_attention": (family.site_pattern, _site),
        "cross_attention": (family.cross_pattern, _cross_attention),
        "feed_forward": (family.feed_forward_pattern, _feed_forward),
        "block": (family.block_pattern, _block),
    }
    for inner, module in root.named_modules():
        path = f"{prefix}{inner}"
        for kind, (pattern, site) in makers.items():
            if kind in kinds and re.fullmatch(pattern, path):
                yield site(family, path, module), module


def _site(family: Family, path: str, module: Any) -> Site:
    joint = bool(re.fullmatch(family.joint_pattern, path))
    if (inward := getattr(module, "to_qkv_mlp_proj", None)) is not None:
        channels, width = inward.in_features, module.heads * module.head_dim
        weights = _size(inward) + _size(module.to_out) - 4 * channels * width
        return Site(path, module.heads, module.head_dim, channels, joint, heads_apart=False, weights=weights)
    head_dim = module.to_q.out_features // module.heads
    kv_heads = module.to_k.out_features // head_dim
    return Site(
        path,
        heads=module.heads,
        head_dim=head_dim,
        channels=module.to_q.in_features,
        joint=joint,
        projects_out=_projected(module),
        heads_apart=heads_apart(module),
        kv_heads=None if kv_heads == module.heads else kv_heads,
    )


def _projected(module: Any) -> Literal["all", "visual", "none"]:
    if getattr(module, "pre_only", False):
        return "none"
    return "visual" if getattr(module, "context_pre_only", False) else "all"


def _feed_forward(family: Family, path: str, module: nn.Module) -> Site:
    linears = [linear for linear in module.modules() if isinstance(linear, nn.Linear)]
    channels, weights = linears[0].in_features, sum(map(_size, linears))
    joint = bool(re.fullmatch(family.joint_pattern, path))
    return Site(path, 1, channels, channels, joint, heads_apart=False, kind="feed_forward", weights=weights)


def _cross_attention(_: Family, path: str, module: Any) -> Site:
    of_image, of_text = (sum(map(_size, own)) for own in ((module.to_q, module.to_out[0]), (module.to_k, module.to_v)))
    width, channels = module.to_q.out_features, module.to_q.in_features
    return Site(path, 1, width, channels, heads_apart=False, kind="cross_attention", weights=of_image, text_weights=of_text)


def _block(family: Family, path: str, module: Any) -> Site:
    """What a block multiplies tokens with outside of its sites; its modulation's layers are multiplied once for a whole sample.

    SD3's last block gives no text.
    """
    within = tuple(site for site, _ in _sites(family, module, EVERYTHING - {"block"}, f"{path}."))
    elsewhere = tuple(f"{site.path}." for site in within)
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    own = {
        name: _size(layer)
        for name, layer in layers.items()
        if not (re.fullmatch(family.per_sample_pattern, name) or f"{path}.{name}".startswith(elsewhere))
    }
    of_text = sum(size for name, size in own.items() if re.fullmatch(family.text_pattern, name))
    return Site(
        path,
        heads=1,
        head_dim=within[0].channels,
        channels=within[0].channels,
        joint=any(site.joint for site in within) and not getattr(module, "context_pre_only", False),
        heads_apart=False,
        kind="block",
        weights=sum(own.values()) - of_text,
        text_weights=of_text,
        within=within,
    )


def _size(linear: nn.Linear) -> int:
    return linear.in_features * linear.out_features


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], callee: str) -> dict[str, Any]:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputsInvalid(f"{callee} cannot be called so: {error}; wanted {signature}") from error
    bound.apply_defaults()
    return dict(bound.arguments)
