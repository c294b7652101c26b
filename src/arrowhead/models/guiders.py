"""Pipelines whose guider does classifier-free guidance: those of HunyuanImage, and every modular pipeline of diffusers.

A guider splits a step into batches, each of which is a call of the transformer: the conditional one, then the unconditional.
So the branches come from the guider, and no table names a modular pipeline's class. Functions get the arguments of a pipeline's
call by name, and the pipeline as `pipe`.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from arrowhead.models.family import Family
from arrowhead.upstream import guider_predictions, guider_settings


def is_modular(pipe: Any) -> bool:
    """Whether a pipeline is a modular one, or of a class that inherits from it."""
    return any(cls.__name__ == "ModularPipeline" for cls in type(pipe).__mro__)


def modular(family: Family) -> Family:
    """The facts about a family where a modular pipeline calls its transformer."""
    return replace(
        family,
        guided=guided_by_guider,
        guidance_scale=scale_of_guider,
        guidance_changes=guider_interval,
        unsupported_call=unsupported_guider,
        second_guidance_scale=None if family.second_guidance_scale is None else second_scale,
    )


def guider_of(call: Mapping[str, Any]) -> Any:
    """The guider of a pipeline; None where there is none. HunyuanImage has another one for prompts with text to write."""
    pipe, glyphs = call["pipe"], call.get("prompt_embeds_2")
    other = getattr(pipe, "ocr_guider", None)
    return other if other is not None and glyphs is not None and bool((glyphs != 0).any()) else getattr(pipe, "guider", None)


def guided_by_guider(call: Mapping[str, Any]) -> bool:
    """Whether a pipeline's guider has both branches. Without a guider there is the conditional one alone."""
    return _guides(guider_of(call))


def scale_of_guider(call: Mapping[str, Any]) -> float:
    """The scale of a pipeline's guider, in uncond + scale · (cond - uncond)."""
    return _scale(guider_of(call))


def second_scale(call: Mapping[str, Any]) -> float:
    """The scale of the guider that belongs to the second transformer."""
    return _scale(call["pipe"].guider_2)


def guider_interval(call: Mapping[str, Any]) -> str | None:
    """A guider's guidance in some of the steps only."""
    guider = guider_of(call)
    stop = guider_settings(guider).stop if _guides(guider) else 1
    return f"stop={stop} of the guider, by which some steps have guidance and some do not" if stop < 1 else None


def unsupported_guider(call: Mapping[str, Any]) -> str | None:
    """A guider that no plan goes with."""
    guiders = [guider for name in ("guider", "guider_2") if (guider := getattr(call["pipe"], name, None)) is not None]
    remedy = "update_components(guider=ClassifierFreeGuidance(...)) has two plain branches"
    for guider in guiders:
        name = type(guider).__name__
        if not _guides(guider):
            continue
        if (count := guider_predictions(guider)) > 2:
            return f"a {name}, which calls the transformer {count} times in a step; {remedy}"
        if any("prepare_models" in vars(cls) for cls in type(guider).__mro__ if cls.__name__ != "BaseGuidance"):
            return f"a {name}, which leaves out layers of the transformer in one of its calls; {remedy}"
        if _number(guider) is None:
            return f"a {name}, which has several guidance scales; {remedy}"
        if (start := guider_settings(guider).start) > 0:
            return f"start={start} of the guider, by which guidance begins on the way"
    if len({_guides(guider) for guider in guiders}) > 1:
        return "a guider for one of two transformers, and none for the other; give both one"
    return None


def _number(guider: Any) -> float | None:
    scale = getattr(guider, "guidance_scale", None)
    return float(scale) if isinstance(scale, int | float) else None


def _guides(guider: Any) -> bool:
    """Whether a guider is on, and has a scale other than the one that leaves the conditional branch alone."""
    if guider is None or not guider_settings(guider).enabled:
        return False
    scale = _number(guider)
    return scale is None or not math.isclose(scale, 0.0 if guider.use_original_formulation else 1.0)


def _scale(guider: Any) -> float:
    scale = None if guider is None else _number(guider)
    return 1.0 if scale is None else scale + bool(guider.use_original_formulation)
