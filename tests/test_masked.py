"""Models with an attention mask of their own: a band is ANDed with it."""

import pytest
import torch
from independent import dense_mask
from pipelines import dit
from replay import assert_identical, assert_same, compressed, distance, plan, replay, trace
from test_contracts import OwnProcessor
from untouched import left_as_it_was

from arrowhead.plans.layout import Tokens

MIXED = ["FFF", "WXV", "RRW", "CwR", "VYR"]


def under(mask):
    """A `replay.softmax_attention` under the model's own mask: boolean, or added to the scores."""

    def attention(q, k, v, radius):
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5 + bias
        weights = scores.exp() * dense_mask(Tokens(q.shape[2]), radius)  # (B, H, N, N)
        return torch.einsum("bhij,bhjd->bhid", weights / weights.sum(-1, keepdim=True), v)

    return attention


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), ()], ids=["one", "each head", "two dimensions"])
def test_a_band_where_the_model_masks_attention(boolean, shape, monkeypatch):
    bench, n = dit(), 16
    assert (bench.visual, bench.attentions[0].heads) == (n, 3)
    seed = torch.seed()
    print(f"seed {seed}")
    seen = (torch.rand(*shape, n, n) < 0.5) | torch.eye(n, dtype=torch.bool)  # each token sees itself
    mask = seen if boolean else torch.randn(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    unmasked = replay(bench, MIXED, bench.inputs())
    monkeypatch.setattr("replay.softmax_attention", under(mask))
    wanted = replay(bench, MIXED, bench.inputs())
    for attn in bench.attentions:
        attn.processor = OwnProcessor(mask)
    with left_as_it_was(bench):
        assert_same(compressed(bench, plan(bench, MIXED), bench.inputs()), wanted)
        assert_identical(compressed(bench, plan(bench, ["FFF"] * 5), bench.inputs()), trace(bench, bench.inputs()))
    assert distance(wanted, unmasked) > 0.05
