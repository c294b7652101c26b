"""Finds the family and the sites of a pipeline or a custom model."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import nn

from arrowhead.errors import UnsupportedPipeline
from arrowhead.models.conflicts import require_no_conflicts
from arrowhead.models.custom import (
    Adapter,
    CustomModel,
    function_path,
    matching_paths,
    require_separate,
    tokens_by_adapter,
)
from arrowhead.models.custom_attention import CalledFunction, Forward
from arrowhead.models.families import FAMILIES
from arrowhead.models.family import NONE, Family
from arrowhead.models.guiders import is_modular, modular
from arrowhead.models.model import Model, transformers_of
from arrowhead.models.sites import (
    custom_attention_site,
    custom_block_site,
    custom_cross_attention_site,
    function_site,
    sites_in,
)
from arrowhead.models.unsupported import UNSUPPORTED, UNSUPPORTED_PIPELINES
from arrowhead.plans.layout import ALL_KINDS, ATTENTION_KINDS, BranchOrder, Kind, Site
from arrowhead.upstream import named_modules, uncompiled

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline

ADAPTER = "describe the transformer with an arrowhead.Adapter, and give both in place of the pipeline"
"""The remedy for a pipeline that the table does not have."""
PAGE = "docs/families.md, or the command `arrowhead families`, has all"


def find(pipe: "DiffusionPipeline | CustomModel", kinds: Collection[Kind] = ATTENTION_KINDS) -> Model:
    """Find the sites of these kinds, by default self-attention, in a pipeline of the families table or in a custom model.

    Raises:
        UnsupportedPipeline: the pipeline or its transformer is not in the table, or has no site of these kinds; or the
            transformer carries what no plan goes with, see `conflicts`.
    """
    if isinstance(pipe, CustomModel):
        return _find_custom(pipe, kinds)
    order: BranchOrder
    transformers = transformers_of(pipe)
    family = _family_of(pipe, transformers)
    _require_same_config(family, pipe, transformers)
    require_no_conflicts(transformers)
    transformer, *_ = transformers
    if is_modular(pipe):  # its guider calls the transformer once for each branch
        family, order = modular(family), "two_calls"
    else:
        order = _branch_order_of(pipe, family)
    modules = dict(sites_in(family, transformer, kinds))
    if not modules:
        there = ", ".join(sorted({site.kind for site, _ in sites_in(family, transformer, ALL_KINDS)})) or "none"
        raise UnsupportedPipeline(
            f"got kinds {', '.join(sorted(kinds))} for a {type(transformer).__name__}, wanted some that it has: {there}"
        )
    model = Model(pipe, transformers, family, order, modules)
    model.require_signatures()
    return model


def _family_of(pipe: "DiffusionPipeline", transformers: Sequence[Any]) -> Family:
    """The family in the table that the first transformer's class, or a class that it inherits from, belongs to."""
    name = type(pipe).__name__
    if isinstance(pipe, str | PathLike):
        raise UnsupportedPipeline(
            f"got a {name}, {str(pipe)!r:.200}, wanted a pipeline; load it with diffusers.DiffusionPipeline.from_pretrained"
        )
    if not transformers:
        raise UnsupportedPipeline(
            f"take a pipeline with a diffusion transformer: got {name}, which has no transformer, wanted one like "
            f"{_nearest(name, _pipelines())}; {PAGE}"
        )
    transformer = transformers[0]
    ancestry = {cls.__name__ for cls in type(transformer).__mro__}
    for family in FAMILIES:
        if family.transformer in ancestry:
            if unsupported := family.unsupported_transformer(transformer):
                raise UnsupportedPipeline(
                    f"got {name} with a {type(transformer).__name__} that has {unsupported}; wanted one without"
                )
            return family
    why = next((f", which has {UNSUPPORTED[cls]}" for cls in ancestry if cls in UNSUPPORTED), "")
    kind, remedy = type(transformer).__name__, "take a model of another family" if why else ADAPTER
    nearest = _nearest(kind, {family.transformer: family.name for family in FAMILIES})
    raise UnsupportedPipeline(f"{remedy}: got {name} with a {kind}{why}, wanted a transformer like {nearest}; {PAGE}")


def _pipelines() -> dict[str, str]:
    """The families' names by their pipelines' classes."""
    return {pipeline: family.name for family in FAMILIES for pipeline in family.branch_order}


def _nearest(name: str, known: Mapping[str, str], most: int = 3) -> str:
    """Up to three classes whose names are most like this one, each with its family, for an error."""
    return ", ".join(f"{match} ({known[match]})" for match in get_close_matches(name, known, n=most, cutoff=0))


def _require_same_config(family: Family, pipe: "DiffusionPipeline", transformers: Sequence[Any]) -> None:
    """Check that a second transformer is expected and has the class and config of the first, and so the same sites."""
    if len(transformers) == 1:
        return
    name = type(pipe).__name__
    if family.second_from is None:
        raise UnsupportedPipeline(f"got {name} with a second transformer, wanted one for all steps")
    first, second = ({"class": type(t), **t.config} for t in transformers)
    differences = sorted(key for key in {*first, *second} if key[0] != "_" and first.get(key) != second.get(key))
    if differences:
        raise UnsupportedPipeline(
            f"got {name} with two transformers that differ in {', '.join(differences)}; wanted them alike, so that a plan can "
            "speak of both"
        )


def _branch_order_of(pipe: "DiffusionPipeline", family: Family) -> BranchOrder:
    """The order of the CFG branches that the table has for the pipeline's class, or for the nearest that it inherits from."""
    name = type(pipe).__name__
    for cls in type(pipe).__mro__:
        if cls.__name__ in family.branch_order:
            return family.branch_order[cls.__name__]
        if why := UNSUPPORTED_PIPELINES.get(cls.__name__):
            others = _nearest(name, dict.fromkeys(family.branch_order, family.name))
            raise UnsupportedPipeline(
                f"take another pipeline with this transformer: got {name}, which has {why}, wanted one like {others}; {PAGE}"
            )
    others = _nearest(name, dict.fromkeys(family.branch_order, family.name))
    raise UnsupportedPipeline(
        f"{ADAPTER}: got {name}, whose order of CFG branches is not known, wanted one like {others}, or a subclass; {PAGE}"
    )


def _find_custom(custom: CustomModel, kinds: Collection[Kind]) -> Model:
    """Find the sites that a custom model's adapter names.

    Raises:
        UnsupportedPipeline: the adapter's patterns match nothing, or a module's sizes do not follow from its layers.
    """
    require_no_conflicts([custom.transformer])
    adapter, root = custom.adapter, uncompiled(custom.transformer)
    require_separate(adapter, root)
    family = _family_by_adapter(adapter, root)
    modules, forwards = dict(sites_in(family, root, kinds)), dict[str, Forward]()
    functions, attends = dict[str, CalledFunction](), "self_attention" in kinds
    for each in adapter.functions if attends else ():
        for path in matching_paths(each.pattern, root):
            module = uncompiled(root.get_submodule(path))
            modules[site := function_site(function_path(path, each), module, each)] = module
            functions[site.path] = each.called_function()
    for pattern, attention in adapter.attention.items() if attends else ():
        for path in matching_paths(pattern, root):
            module = uncompiled(root.get_submodule(path))
            modules[custom_attention_site(family, path, module, attention)] = module
            if (forward := attention.replacement_forward()) is not None:
                forwards[path] = forward
            if (function := attention.called_function()) is not None:
                functions[path] = function
    modules |= _besides(adapter, root, kinds)
    if not modules:
        raise UnsupportedPipeline(f"got kinds {', '.join(sorted(kinds))}, of which the adapter of a {family.name} names none")
    order = {path: place for place, (path, _) in enumerate(named_modules(root))}
    in_order = dict(sorted(modules.items(), key=lambda item: (order[item[0].module_path], item[0].kind != "block")))
    blocks = {path: block for pattern, block in adapter.blocks.items() for path in matching_paths(pattern, root)}
    model = Model(custom, (root,), family, adapter.cfg or "cond_first", in_order, forwards, functions, blocks)
    model.require_signatures()
    return model


def _besides(adapter: Adapter, root: nn.Module, kinds: Collection[Kind]) -> dict[Site, nn.Module]:
    """The cross-attention sites that an adapter names, and the blocks with the sites within them."""
    found = {}
    for pattern, text in adapter.cross_attention.items() if "cross_attention" in kinds else ():
        for path in matching_paths(pattern, root):
            module = root.get_submodule(path)
            found[custom_cross_attention_site(path, module, text)] = module
    if "block" in kinds and adapter.blocks:
        within = _find_custom(CustomModel(root, replace(adapter, blocks={})), ALL_KINDS).sites
        for pattern, block in adapter.blocks.items():
            for path in matching_paths(pattern, root):
                module = root.get_submodule(path)
                found[custom_block_site(path, module, block, within)] = module
    return found


def _family_by_adapter(adapter: Adapter, root: nn.Module) -> Family:
    """The facts about a custom model, except its attention modules."""
    return Family(
        name=type(root).__name__,
        transformer=type(root).__name__,
        site_pattern=NONE,
        feed_forward_pattern=adapter.feed_forward,
        block_pattern=NONE,
        branch_order={},
        tokens=partial(tokens_by_adapter, adapter),
        guided=lambda _: adapter.cfg is not None,
        guidance_scale=lambda _: adapter.guidance_scale,
        latent_channels=lambda _: adapter.latent_channels,
    )
