"""Single heads: which modules' heads can be projected alone, and that they are projected as all are."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from hypothesis import given
from hypothesis import strategies as st
from independent import few

from arrowhead.engine.head_projection import ProjectedHeads
from arrowhead.models.head_separation import can_project_heads_separately


class OwnLinear(torch.nn.Linear):
    """Who knows what it does?"""


def attention(**settings):
    """A module of diffusers: 3 heads of 8 channels."""
    return Attention(query_dim=20, context_pre_only=False, **{"heads": 3, "dim_head": 8} | settings)


def changed(change, **settings):
    module = attention(**settings)
    change(module)
    return module


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": True},
        {"kv_heads": 3},
        {"kv_heads": 1},
        {"qk_norm": "rms_norm"},
        {"qk_norm": "layer_norm"},
        {"added_kv_proj_dim": 12},
    ],
    ids=str,
)
def test_heads_of_plain_modules_stand_apart(settings):
    assert can_project_heads_separately(attention(**settings))


SPANNING = {
    "a norm over all heads": lambda: attention(qk_norm="rms_norm_across_heads", kv_heads=3),
    "another norm over all heads": lambda: attention(qk_norm="layer_norm_across_heads", kv_heads=3),
    "a linear layer of its own": lambda: changed(lambda m: setattr(m, "to_v", OwnLinear(20, 24))),
    "one for the text": lambda: changed(lambda m: setattr(m, "add_q_proj", OwnLinear(12, 24)), added_kv_proj_dim=12),
    "fused projections": lambda: changed(lambda m: m.fuse_projections()),
    "a hook": lambda: changed(lambda m: m.to_k.register_forward_hook(lambda _m, _a, out: 2 * out)),
    "a hook before": lambda: changed(lambda m: m.to_q.register_forward_pre_hook(lambda _m, args: args)),
    "a forward put on it": lambda: changed(lambda m: setattr(m.to_q, "forward", lambda x: 0 * x)),
}


@pytest.mark.parametrize("make", SPANNING.values(), ids=SPANNING)
def test_heads_of_others_do_not(make):
    assert not can_project_heads_separately(make())


@few
@given(data=st.data(), bias=st.booleans(), seed=st.integers(0, 2**32))
def test_some_heads_project_exactly_their_rows(data, bias, seed):
    torch.manual_seed(seed)
    module = attention(bias=bias, added_kv_proj_dim=12, added_proj_bias=bias)
    heads = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
    some = ProjectedHeads(module, heads)
    assert some.heads == len(heads)
    assert some.to_out is module.to_out
    for names, width in ((("to_q", "to_k", "to_v"), 20), (("add_q_proj", "add_k_proj", "add_v_proj"), 12)):
        x = torch.randn(2, 5, width)
        for name in names:
            whole = getattr(module, name)(x).unflatten(-1, (3, 8))  # (B, N, H, D)
            wanted = torch.cat([whole[:, :, head] for head in heads], -1)
            torch.testing.assert_close(getattr(some, name)(x), wanted, rtol=1e-5, atol=1e-6)
