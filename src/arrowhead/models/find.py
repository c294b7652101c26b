"""Find the family and the attention sites of a pipeline at hand. Says where attention is, never what to do with it."""

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from arrowhead.compiled import named_modules, uncompiled
from arrowhead.errors import InputsInvalid, UnsupportedPipeline
from arrowhead.layout import Branches, BranchOrder, Kind, Site, Tokens, seen
from arrowhead.models.adapter import Attention, Forward, Own, matching, require_apart, tokens_of
from arrowhead.models.beside import require_whole
from arrowhead.models.families import FAMILIES
from arrowhead.models.family import NONE, Family
from arrowhead.models.refused import REFUSED
from arrowhead.project import heads_apart

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


ATTENTION: frozenset[Kind] = frozenset({"self_attention"})
EVERYTHING: frozenset[Kind] = frozenset({"self_attention", "cross_attention", "feed_forward", "block"})


DESCRIBE = "; or describe its transformer with an arrowhead.Adapter, and give that with it in place of the pipeline"
"""What is left where nothing is known."""


@dataclass(frozen=True)
class Model:
    """A pipeline's transformer, its family, and its sites with their modules in the order they run.

    Where a second transformer takes over in the middle, it has the same sites; `modules` are those of the first. A module of
    one's own with its adapter takes the places of pipeline and family; `forwards`, by path, are those that have to take the
    place of attention modules' own.
    """

    pipe: "DiffusionPipeline | Own"
    transformers: tuple[nn.Module, ...]
    family: Family
    branch_order: BranchOrder
    modules: Mapping[Site, nn.Module]
    forwards: Mapping[str, Forward] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites in the order they run."""
        return tuple(self.modules)

    @property
    def transformer(self) -> nn.Module:
        """The one that runs first."""
        return self.transformers[0]

    @property
    def placed(self) -> list[tuple[Site, nn.Module]]:
        """The sites with their modules in every transformer."""
        both = ((site, transformer.get_submodule(site.path)) for transformer in self.transformers for site in self.sites)
        return [(site, uncompiled(module) if site.kind == "self_attention" else module) for site, module in both]

    @property
    def called(self) -> tuple[nn.Module, ...]:
        """The transformers as they are called: where torch.compile hides one, what hides it."""
        return called(self.pipe)

    @property
    def switch(self) -> int | None:
        """The step of the call that is running from which the second transformer is called; None where it never is."""
        takes_over = self.family.takes_over
        return None if takes_over is None or len(self.transformers) == 1 else takes_over(self.pipe)

    def due(self, step: int) -> nn.Module:
        """The transformer that is called in a step of the call that is running."""
        return self.transformers[self.switch is not None and step >= self.switch]

    @property
    def steps(self) -> int | None:
        """The denoising steps of the call that is running; one that starts from an image leaves the first ones out.

        None of a loop of one's own, which nobody knows before it ends.
        """
        if isinstance(self.pipe, Own):
            return None
        return len(self.pipe.scheduler.timesteps) - (getattr(self.pipe.scheduler, "begin_index", None) or 0)

    @property
    def counted(self) -> int | None:
        """What the scheduler counts of the steps it made in the call that is running; None where it does not say."""
        return None if isinstance(self.pipe, Own) else getattr(self.pipe.scheduler, "step_index", None)

    @property
    def latent_channels(self) -> int | None:
        """Channels that a sampler goes by, where the transformer gives a variance, too; None where it gives no more."""
        if isinstance(self.pipe, Own):
            return self.pipe.adapter.latent_channels
        config: Any = self.transformer.config
        given = getattr(config, "out_channels", None)
        return int(config.in_channels) if given == 2 * config.in_channels else None

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

    def given(self, arguments: Mapping[str, Any]) -> Any:
        """What the transformer works on, (B, …) or a list, of a call with these `transformer_arguments`."""
        named = self.family.samples
        return arguments[named] if named in arguments else [*arguments.values()][1]  # beside itself

    def tokens(self, arguments: Mapping[str, Any]) -> Tokens:
        """What a call of the transformer with these `transformer_arguments` brings that matters to the sites."""
        return seen(self.family.tokens(self.transformer, arguments), self.sites)

    def guidance_scale(self, call: Mapping[str, Any], step: int) -> float:
        """How far a pipeline call with these arguments, which is running, drives the branches apart in a step."""
        later = self.family.later_guidance_scale
        scale = self.family.guidance_scale if later is None or self.due(step) is self.transformer else later
        return scale(call)

    def branches(self, call: Mapping[str, Any]) -> Branches:
        """How the CFG branches of a pipeline call with these arguments arrive.

        Raises:
            InputsInvalid: the call asks for what cannot be compressed.
        """
        if refused := self.family.refused(call):
            raise InputsInvalid(f"got {refused}; wanted a call without it; leave it out, or remove the plan")
        try:
            guided = self.family.guided(dict(getattr(self.pipe, "config", {})) | dict(call))
        except (TypeError, ValueError) as error:
            raise InputsInvalid(
                f"got guidance that is no number ({error}); wanted one; correct the call's arguments"
            ) from error
        return Branches(self.branch_order, guided)


def find(pipe: "DiffusionPipeline | Own", kinds: Collection[Kind] = ATTENTION) -> Model:
    """Look a pipeline up in the families table and find its sites of these kinds, by default those of attention.

    Raises:
        UnsupportedPipeline: the pipeline or its transformer is not in the table, or no site was found; or the transformer
            carries what no plan goes with, see `beside`.
    """
    if isinstance(pipe, Own):
        require_whole([pipe.transformer])
        return _described(pipe, kinds)
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
    require_whole(transformers)
    order = next((family.branch_order[c.__name__] for c in type(pipe).__mro__ if c.__name__ in family.branch_order), None)
    if order is None:
        raise UnsupportedPipeline(
            f"got {name}, whose order of CFG branches is not known; wanted one of {', '.join(family.branch_order)}, "
            f"or a subclass of one{DESCRIBE}"
        )
    modules = dict(_sites(family, transformer, kinds))
    if not modules:
        there = ", ".join(sorted({site.kind for site, _ in _sites(family, transformer, EVERYTHING)})) or "none"
        raise UnsupportedPipeline(
            f"got kinds {', '.join(sorted(kinds))} for a {type(transformer).__name__}, wanted some that it has: {there}"
        )
    return Model(pipe, transformers, family, order, modules)


def transformers_of(pipe: "DiffusionPipeline") -> tuple[Any, ...]:
    """A pipeline's transformers, in the order they are called, as they are where torch.compile hides them."""
    return tuple(map(uncompiled, called(pipe)))


def called(pipe: "DiffusionPipeline | Own") -> tuple[Any, ...]:
    """A pipeline's transformers, in the order they are called."""
    both = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    return tuple(transformer for transformer in both if isinstance(transformer, nn.Module))


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


def _described(own: Own, kinds: Collection[Kind]) -> Model:
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
            modules[_own_site(family, path, module, attention)] = module
            if (instead := attention.instead()) is not None:
                forwards[path] = instead
    if not modules:
        raise UnsupportedPipeline(f"got kinds {', '.join(sorted(kinds))}, of which the adapter of a {family.name} names none")
    order = {path: place for place, (path, _) in enumerate(named_modules(root))}
    in_order = dict(sorted(modules.items(), key=lambda item: order[item[0].path]))
    return Model(own, (root,), family, adapter.cfg or "cond_first", in_order, forwards)


def _own_site(family: Family, path: str, module: nn.Module, attention: Attention) -> Site:
    """Its sizes: all that its linear layers multiply is taken for four projections."""
    if attention.instead() is None and hasattr(module, "processor") and hasattr(module, "to_q"):
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
    return Site(path, heads, head_dim, channels, joint=attention.joint, heads_apart=False, over=attention.over)


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
        return Site(path, module.heads, module.head_dim, channels, joint, heads_apart=False, weights=weights)
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
        heads_apart=family.heads_apart and heads_apart(module),
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
        heads_apart=False,
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


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], callee: str) -> dict[str, Any]:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputsInvalid(f"{callee} cannot be called so: {error}; wanted {signature}") from error
    bound.apply_defaults()
    return dict(bound.arguments)
