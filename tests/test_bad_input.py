"""Arguments of any type and value: each means something, or is refused in words before the pipeline runs."""

import inspect
import math
import re
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from budget import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from own import Own, STDiT2, left_alone
from pipelines import dit, sd3
from replay import plan as uniform_plan
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.errors import ArrowheadError, ArrowheadWarning, InputsInvalid, NotIntercepted, PlanMismatch, UnsupportedPipeline
from arrowhead.evaluation.side_by_side import evaluate
from arrowhead.plans.cells import Arrow, Attend, Cached, Full, Reuse
from arrowhead.plans.layout import Grid, Site, Tokens
from arrowhead.plans.plan import Plan
from arrowhead.plans.target import Target

few = settings(max_examples=60, deadline=None)

ODD = [
    *(None, True, False, -1, 0, 1, 2, 3.0, 1.5, 0.5, math.nan, math.inf, -math.inf, 10**9, 10**400, 1e300, 1j),
    *("", "x", "site", "space", "flops", "int8", "cond_first", b"x", [], (), {}, [1], (1,), (0.5,), ("a",), {"a": 1}, [[]]),
    *(np.float32(0.5), np.float64(0.5), np.int64(3), np.zeros(2), np.array(1), torch.tensor(0.5), torch.zeros(2)),
    *(object(), print, float, ah.Box(rows=2), ah.Tokens(4), Grid(1, 2, 2), Full(), ("int8",), ("block",), Cached()),
]


def is_flag(value):
    return value is True or value is False


def coefficient(least, most):
    def allowed(v):
        pair = v if isinstance(v, tuple) else (v, v)
        return len(pair) == 2 and all(isinstance(part, int | float) and least <= part <= most for part in pair)

    return allowed


def whole(least, most=math.inf):
    return lambda value: isinstance(value, int) and not is_flag(value) and least <= value <= most


def real(low, high):
    """Above the one, at most the other."""
    return lambda value: isinstance(value, int | float) and not is_flag(value) and low < value <= high


def among(*words):
    return lambda value: isinstance(value, str) and value in words


def or_none(of):
    return lambda value: value is None or of(value)


def several(of, kinds=(tuple, list)):
    return lambda value: isinstance(value, kinds) and all(map(of, value))


def is_callable(value):
    return callable(value)


radius = lambda value: isinstance(value, ah.Box) or whole(0)(value)  # noqa: E731
NAMES = several(among("block", "int8", "cond_first"))
CHECKS = {
    ah.Budget: {
        **dict.fromkeys(("attention_flops", "module_flops", "transformer_flops"), real(0, 1)),
        "speedup": real(1, sys.float_info.max),
        "error": real(0, sys.float_info.max),
        "cache_bytes": or_none(whole(0)),
        "granularity": lambda v: v is None or among("step", "site", "head")(v) or whole(1)(v),
        **dict.fromkeys(("share_cfg", "residual", "reuse", "extrapolate", "precision"), is_flag),
        "slopes": several(real(0, 1), tuple),
        "corrections": whole(0, 2),
    },
    ah.Extent: {
        "radii": or_none(several(radius)),
        "ages": whole(1, 4096),
        "vectors": whole(1, 4096),
        "kinds": lambda v: v is None or (isinstance(v, tuple) and v == ("block",)),
        "checkpoint": is_flag,
        "gradients": is_flag,
        "feedback": lambda v: v is not False and v == 0 if whole(0, 0)(v) else real(0, 1)(v),
        "regions": or_none(whole(1, 2**26)),
        "seed": whole(0, 2**64 - 1),
        "precisions": lambda v: isinstance(v, tuple | list) and v in (("int8",), (), []),
        "one_by_one": is_flag,
        "cache_dtype": among("native", "int8", "fp8"),
        "cache_device": or_none(among("cpu")),
    },
    ah.Headwise: {
        "radii": or_none(several(radius)),
        **dict.fromkeys(("caching", "share_cfg", "residual"), is_flag),
        "prefilter": or_none(real(0, math.inf)),
        "savings": among("flops", "paper"),
    },
    ah.Greedy: {"radii": or_none(several(radius))},
    ah.Box: dict.fromkeys(("frames", "rows", "columns"), or_none(whole(0))),
    ah.Tokens: {
        "visual": whole(1),
        "text": whole(0),
        "text_first": is_flag,
        "frames": lambda v: whole(1)(v) and 4 % v == 0,
        "grid": or_none(lambda v: isinstance(v, Grid)),
    },
    Grid: dict.fromkeys(("frames", "rows", "columns"), whole(1)),
    Arrow: {"radius": radius, "residual": is_flag, "precision": among("native", "int8")},
    Full: {"precision": among("native", "int8")},
    Attend: {"method": lambda v: isinstance(v, Full | Cached), "share_cfg": is_flag},
    Reuse: {"extrapolate": coefficient(-4, 4), "scale": coefficient(0, 2)},
    ah.Attention: {
        "heads": lambda v: isinstance(v, str) or whole(1)(v),
        "head_dim": or_none(whole(1)),
        "channels": or_none(whole(1)),
        "over": among("all", "space", "time"),
        "joint": is_flag,
        "forward": or_none(is_callable),
        "projections": is_flag,
        "function": lambda v: v is None,  # the two go together
        "layout": lambda v: v is None,
    },
    ah.FusedQKV: {
        "heads": lambda v: isinstance(v, str) or whole(1)(v),
        "head_dim": or_none(whole(1)),
        "channels": or_none(whole(1)),
        "over": among("all", "space", "time"),
        "joint": is_flag,
        "qkv": lambda v: isinstance(v, str),
        **dict.fromkeys(("q_norm", "k_norm", "rotary"), or_none(lambda v: isinstance(v, str))),
        "rotary_first": is_flag,
        "proj": lambda v: isinstance(v, str),
    },
    ah.Adapter: {
        "attention": lambda v: isinstance(v, dict) and all(isinstance(a, ah.Attention) for a in v.values()),
        "tokens": is_callable,
        "cfg": or_none(among("cond_first", "uncond_first", "two_calls")),
        "feed_forward": lambda v: isinstance(v, str),
        "guidance_scale": real(-3.5e38, 3.4e38),
        "latent_channels": or_none(whole(1)),
        "functions": lambda v: isinstance(v, list | tuple) and not len(v),
        "cross_attention": lambda v: isinstance(v, dict) and not v,
        "blocks": lambda v: isinstance(v, dict) and not v,
    },
}
BASE = {
    ah.Tokens: {"visual": 4},
    Grid: {"frames": 1, "rows": 2, "columns": 2},
    Arrow: {"radius": 1},
    ah.Attention: {"head_dim": 8},
    ah.Adapter: {"attention": {"a": ah.Attention()}, "tokens": lambda *_: Tokens(4)},
}
ASKED = {"attention_flops", "module_flops", "transformer_flops", "speedup", "error"}
FIELDS = [(cls, name) for cls, checks in CHECKS.items() for name in checks]


def is_refused(build):
    """In words, as a ValueError."""
    with pytest.raises(ValueError, match=r"(?s)got .*wanted") as caught:
        build()
    assert len(str(caught.value)) < 2000
    return True


def test_every_setting_is_checked_here():
    for cls, checks in CHECKS.items():
        assert set(checks) == set(inspect.signature(cls).parameters), cls


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=[f"{cls.__name__}.{name}" for cls, name in FIELDS])
def test_settings_mean_something_or_are_refused(cls, name):
    base = {"module_flops": 0.5} if cls is ah.Budget and name not in ASKED else BASE.get(cls, {})
    for value in ODD:
        build = lambda: cls(**base | {name: value})  # noqa: B023, E731
        try:
            means = CHECKS[cls][name](value)
        except (TypeError, ValueError, RuntimeError):  # arrays
            means = False
        if means:
            build()
        else:
            assert is_refused(build), value


@few
@given(data=st.data())
def test_settings_with_several_odd_values(data):
    """What is wrong twice is refused as well; nothing but a ValueError comes of it."""
    cls = data.draw(st.sampled_from([cls for cls, checks in CHECKS.items() if len(checks) > 1]))
    names = data.draw(st.lists(st.sampled_from([*CHECKS[cls]]), min_size=2, max_size=4, unique=True))
    given = BASE.get(cls, {}) | {name: data.draw(st.sampled_from(ODD)) for name in names}
    try:
        cls(**given)
    except ValueError as error:
        assert "got" in str(error)
        assert "wanted" in str(error)


PLAN = {"cells": ((Attend(),),), "target": Target("T", "S", {}, (Site("a", 1, 1, 1),)), "tokens": Tokens(4), "guided": True}


@pytest.mark.parametrize("name", inspect.signature(Plan).parameters)
def test_plans_of_anything(name):
    means = {"guided": is_flag, "calls": whole(1, 2), "switch": or_none(whole(0, 0)), "about": lambda v: isinstance(v, dict)}
    means |= {"tokens": lambda v: isinstance(v, Tokens), "target": lambda v: False, "cells": lambda v: False}
    for value in ODD:
        if is_flag(value) and name in ("calls", "switch"):
            continue  # 1 and 0 by another name
        if means[name](value):
            Plan(**PLAN | {name: value})
        else:
            assert is_refused(lambda: Plan(**PLAN | {name: value})), value  # noqa: B023


IN_WORDS = re.compile(r"(?s)(got|cannot be called so|did not call|gives)\b.*wanted|does not fit .*search again")


class Ran(Exception):
    """The transformer was called."""


@pytest.fixture(scope="module")
def armed():
    """A pipeline whose transformer must not run: what is wrong is known before."""

    def ran(*_):
        raise Ran

    bench = dit(torch.float32)
    bench.pipe.transformer.register_forward_pre_hook(ran)
    return bench


def refuses(call, *families):
    """Whether it is one of these errors, in words: not that the pipeline runs, nor that anything is given."""
    try:
        call()
    except Ran:
        return False
    except families as error:
        assert IN_WORDS.search(str(error)), error
        return True
    return False


def threshold(value):
    if isinstance(value, str):
        return False  # of ODD
    return isinstance(value, int | float | np.floating | np.integer) and not is_flag(value) and 0 <= value < 1.8e308


def test_thresholds_of_anything(armed):
    for value in ODD:
        if value is not None and not is_flag(value):
            search = lambda: ah.search(armed.pipe, armed.inputs(), threshold=value, progress=False)  # noqa: B023, E731
            try:
                means = threshold(value)
            except OverflowError:
                means = False
            if value is not None and not means:
                assert refuses(search, InputsInvalid), value
    assert not refuses(lambda: ah.search(armed.pipe, armed.inputs(), threshold=np.float32(0.5), progress=False), InputsInvalid)


@pytest.mark.parametrize("name", ["strategy", "budget", "loss", "extent", "table", "adapter"])
def test_searches_with_anything(armed, name):
    families = (InputsInvalid, UnsupportedPipeline) if name == "adapter" else (InputsInvalid,)
    for value in ODD:
        if value is not None:
            search = lambda: ah.search(armed.pipe, armed.inputs(), progress=False, **{name: value})  # noqa: B023, E731
            assert refuses(search, *families), value


@pytest.mark.parametrize(
    "call",
    {
        "search": lambda pipe, value: ah.search(pipe, value, progress=False),
        "calibrate": lambda pipe, value: ah.calibrate(pipe, value, progress=False),
        "calibration_bytes": ah.calibration_bytes,
        "analyze": lambda pipe, value: ah.analyze(pipe, value, progress=False),
        "extent": lambda pipe, value: ah.calibrate(pipe, {"class_labels": [1]}, extent=value, progress=False),
        "apply": ah.apply,
        "solve's table": lambda pipe, value: ah.solve(value, ah.Budget(module_flops=0.5)),
        "solve's budget": lambda pipe, value: ah.solve(synthetic(0), value),
        "sweep": lambda pipe, value: ah.sweep(synthetic(0), value),
        "evaluate's plans": lambda pipe, value: evaluate(pipe, value, {}, seeds=[0]),
        "evaluate's inputs": lambda pipe, value: evaluate(pipe, {"a": Plan(**PLAN)}, value, seeds=[0]),
        "evaluate's seeds": lambda pipe, value: evaluate(pipe, {"a": Plan(**PLAN)}, {}, seeds=value),
        "tiny": lambda pipe, value: ah.tiny.load(value),
    }.items(),
    ids=lambda call: call[0],
)
def test_functions_with_anything(armed, call):
    meant = {"sweep": [[], (), "", b"x"[:0]], "evaluate's seeds": [[1], (1,)], "extent": [None]}
    for value in ODD:
        if any(type(value) is type(other) and value == other for other in meant.get(call[0], ())):
            continue
        assert refuses(lambda: call[1](armed.pipe, value), InputsInvalid, PlanMismatch), value  # noqa: B023


@pytest.mark.parametrize("name", ["only", "site", "heads", "step", "radius", "sampled"])
def test_analyses_with_anything(armed, name):
    meant = {"only": [None], "site": [0, 1, 2, None], "heads": [[1], (1,)], "step": [0, 1, 2, 10**9, 10**400, None]}
    meant |= {"radius": [0, 1, 2, 10**9, 10**400, None], "sampled": [1, 2, 10**9, 10**400]}
    for value in ODD:
        if any(type(value) is type(other) and value == other for other in meant[name]):
            continue  # of the right type; what is too much the run has to show
        call = lambda: ah.analyze(armed.pipe, armed.inputs(), progress=False, **{name: value})  # noqa: B023, E731
        if name == "sampled" and value is None:
            continue
        assert refuses(call, InputsInvalid), value


CALLS = {
    "num_inference_steps": [0, -1, "5", 1.5, None, math.nan],
    "guidance_scale": ["4", None, [3.0], {}],
    "generator": [[], [torch.Generator()] * 3, "seed", 0, [0]],
    "no_such": [1],
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("make", [dit, sd3])
def test_calls_of_the_pipeline(make, name):
    """What diffusers refuses it refuses under a plan and in a search, or arrowhead does before; nothing is left behind."""
    bench = make(torch.float32)
    plan = uniform_plan(bench, ["FFF", "RRR", "FFF", "WWW", "FFF"])

    def under_a_plan(inputs):
        with ah.applied(bench.pipe, plan):
            bench.pipe(**inputs)

    with left_as_it_was(bench), warnings.catch_warnings(action="ignore", category=ArrowheadWarning):
        for value in CALLS[name]:
            try:
                bench.pipe(**bench.inputs() | {name: value})
                raw = None
            except Exception as error:
                raw = type(error)
            for call in (under_a_plan, lambda inputs: ah.search(bench.pipe, inputs, threshold=0.1, progress=False)):
                try:
                    call(bench.inputs() | {name: value})
                except ArrowheadError as error:
                    assert "wanted" in str(error) or "search again" in str(error)
                except Exception as error:
                    assert type(error) is raw, value
                else:
                    assert raw is None, value


OWN = Own(STDiT2(), ah.open_sora(guidance_scale=3.0))
KEY, ATTENTION = next(iter(OWN.adapter.attention.items()))


def with_attention(**changes):
    return {"attention": {KEY: replace(ATTENTION, **changes)}}


ADAPTERS = {
    "a pattern of nothing": {"attention": {"no.such.path": ATTENTION}},
    "a pattern of everything": {"attention": {".*": ATTENTION}},
    "a pattern of the whole": {"attention": {"": ATTENTION}},
    "a pattern of norms": {"attention": {r"blocks\.\d+\.attn\.q_norm": replace(ATTENTION, heads=2)}},
    "a pattern of feed-forwards": {"attention": {r"blocks\.\d+\.mlp": replace(ATTENTION, heads=2)}},
    "a module named twice": {"attention": {r"blocks\.0\.attn": ATTENTION, r"blocks\.\d\.attn": ATTENTION}},
    "feed-forwards that are nothing": {"feed_forward": "no.such.path"},
    "feed-forwards that are everything": {"feed_forward": ".*"},
    "feed-forwards that are the whole": {"feed_forward": ""},
    "feed-forwards around attention": {"feed_forward": r"blocks\.\d+"},
    "feed-forwards that are attention": {"feed_forward": r"blocks\.\d+\.attn"},
    "heads of a name that is not there": with_attention(heads="no_such"),
    "heads of a name that is no number": with_attention(heads="qkv"),
    "heads of a name that is a flag": with_attention(heads="training"),
    "heads that do not divide": with_attention(heads=3),
    "other heads": with_attention(heads=1),
    "more heads than channels": with_attention(heads=10**30),
    "another width of heads": with_attention(head_dim=3),
    "other channels": with_attention(channels=3),
    "all in one sequence": with_attention(over="all"),
    "time for space": with_attention(over="time"),
    "a forward of nothing": {"attention": {KEY: ah.Attention(over=ATTENTION.over, forward=lambda *_: None)}},
    "a forward of one argument": {"attention": {KEY: ah.Attention(over=ATTENTION.over, forward=lambda module: module)}},
    "tokens of nothing": {"tokens": lambda *_: None},
    "a number of tokens": {"tokens": lambda *_: 70},
    "tokens of a name that is not there": {"tokens": lambda model, call: call["no_such"]},
    "tokens of no arguments": {"tokens": lambda: Tokens(70)},
    "tokens that fail": {"tokens": lambda *_: 1 / 0},
    "too few tokens": {"tokens": lambda *_: Tokens(3)},
    "far too many tokens": {"tokens": lambda *_: Tokens(10**9)},
    "two calls for one": {"cfg": "two_calls"},
}
FOR_BUDGETS = {
    "more channels than there are": {"latent_channels": 9},
    "guidance beyond float32": {"guidance_scale": 1e38},
}


@pytest.mark.filterwarnings("ignore::arrowhead.errors.CalibrationFitted")  # so many tokens would need less memory
@pytest.mark.parametrize("change", [*ADAPTERS.values(), *FOR_BUDGETS.values()], ids=[*ADAPTERS, *FOR_BUDGETS])
def test_adapters_that_do_not_describe_the_module(change):
    """Refused by name, and the module is left as it was."""
    adapter, before = replace(OWN.adapter, **change), left_alone(OWN.model)
    searches = [{}] if change in FOR_BUDGETS.values() else [{}, {"threshold": 0.1}]
    for how in searches:
        with pytest.raises((InputsInvalid, UnsupportedPipeline, NotIntercepted, PlanMismatch), match=IN_WORDS):
            ah.search(OWN.model, OWN.sample, adapter=adapter, progress=False, **how)
        assert left_alone(OWN.model) == before


@pytest.mark.parametrize("pattern", ["(", "*", "[a", "a{2,1}", 3, None, b"x"], ids=str)
def test_patterns_that_are_no_regular_expressions(pattern):
    for change in ({"attention": {pattern: ATTENTION}}, {"feed_forward": pattern}):
        with pytest.raises(InputsInvalid, match=r"got the pattern .*wanted a regular expression"):
            replace(OWN.adapter, **change)
