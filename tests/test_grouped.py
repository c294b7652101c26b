"""Heads of queries that share keys and values: in kernels, the engine, projections, FLOPs, and Lumina 2."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0
from families import TEXT, lumina2
from family_replay import random_cells, replaying
from hypothesis import given
from hypothesis import strategies as st
from independent import few, token_layouts
from replay import assert_identical, distance, trace
from test_families import STEPS, plan_of
from test_kernels import dense, random_mask
from torch.utils.flop_counter import FlopCounterMode

import arrowhead as ah
from arrowhead.engine.head_projection import ProjectedHeads
from arrowhead.errors import InputsInvalid
from arrowhead.kernels import dispatch
from arrowhead.models.find import find
from arrowhead.plans.cells import FULL
from arrowhead.plans.flops import projection_flops
from arrowhead.plans.layout import Site, Tokens


@pytest.mark.parametrize("kernel", ["chunked", "reference"])
@few
@given(data=st.data(), tokens=token_layouts, groups=st.integers(1, 3), each=st.integers(2, 3), masked=st.booleans())
def test_kernels_give_the_same_as_with_repeated_keys(kernel, data, tokens, groups, each, masked):
    heads = groups * each
    radii = data.draw(st.lists(st.sampled_from([None, 0, 1, 3]), min_size=heads, max_size=heads))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    q, k, v = (torch.randn(2, count, tokens.total, 8, generator=generator) for count in (heads, groups, groups))
    mask = random_mask("each", tokens, radii, (2, heads), seed=1) if masked else None
    own = [[tensor[:, head // each] for head in range(heads)] for tensor in (k, v)]
    wanted = dense(q, *(torch.stack(tensors, 1) for tensors in own), tokens, radii, mask=mask)
    given_by = dispatch.arrow(q, k, v, tokens, radii, mask=mask, kernel=kernel)
    torch.testing.assert_close(given_by.double(), wanted, rtol=1e-4, atol=1e-5)


class Grouped(Lumina2AttnProcessor2_0):
    """The model's processor, but keys are not repeated before the call of attention: torch's function, or diffusers'."""

    by_diffusers = False

    def __call__(
        self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None, base_sequence_length=None
    ):
        q, k, v = (layer(hidden_states).unflatten(-1, (-1, 8)) for layer in (attn.to_q, attn.to_k, attn.to_v))  # (B, N, H, D)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k = (
            torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * image_rotary_emb[:, :, None])
            for x in (q, k)
        )
        q, k = (x.flatten(3).to(v.dtype) for x in (q, k))
        if self.by_diffusers:
            out = dispatch_attention_fn(q, k, v, scale=attn.scale, enable_gqa=True)
        else:
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(*heads_first, scale=attn.scale, enable_gqa=True).transpose(1, 2)
        return attn.to_out[0](out.flatten(2))


class GroupedByDiffusers(Grouped):
    by_diffusers = True


@pytest.mark.parametrize("processor", [Grouped, GroupedByDiffusers])
@pytest.mark.parametrize("seed", range(2))
def test_the_engine_takes_calls_with_fewer_heads_of_keys(processor, seed):
    bench = lumina2()
    model, inputs = find(bench.pipe), {"seed": seed, "images": 2}
    cells = random_cells(seed, model.sites, STEPS, share=True)
    with replaying(bench, model.modules, cells, guided=True):  # by the model's own processors, which repeat keys
        wanted = trace(bench, bench.inputs(**inputs))
    for module in model.modules.values():
        module.processor = processor()
    untouched = trace(bench, bench.inputs(**inputs))
    with ah.applied(bench.pipe, plan_of(bench, model, [[FULL] * len(model.sites)] * STEPS)):
        assert_identical(trace(bench, bench.inputs(**inputs)), untouched)
    with ah.applied(bench.pipe, plan_of(bench, model, cells)):
        given_by = trace(bench, bench.inputs(**inputs))
    assert distance(given_by, wanted) < 1e-5
    assert distance(given_by, untouched) > 1e-2


@few
@given(data=st.data(), groups=st.integers(1, 3), each=st.integers(2, 3), bias=st.booleans(), seed=st.integers(0, 2**32))
def test_some_heads_project_their_queries_and_all_keys(data, groups, each, bias, seed):
    torch.manual_seed(seed)
    heads = groups * each
    module = Attention(query_dim=20, heads=heads, dim_head=8, kv_heads=groups, bias=bias)
    some = data.draw(st.lists(st.integers(0, heads - 1), min_size=1, max_size=heads, unique=True))
    x, own = torch.randn(2, 5, 20), ProjectedHeads(module, some)
    with FlopCounterMode(display=False) as counter:
        q, k, v = own.to_q(x), own.to_k(x), own.to_v(x)
    for projected, layer, shared_by in ((q, module.to_q, 1), (k, module.to_k, each), (v, module.to_v, each)):
        whole = layer(x).unflatten(-1, (-1, 8))  # (B, N, H or G, D)
        wanted = torch.cat([whole[:, :, head // shared_by] for head in some], -1)
        torch.testing.assert_close(projected, wanted, rtol=1e-5, atol=1e-6)
    site = Site("blocks.0.attn", heads, 8, 20, projects_out="none", kv_heads=groups)
    assert counter.get_total_flops() == 2 * projection_flops(site, Tokens(5), len(some))


def test_sites_know_how_many_heads_of_keys_they_have():
    sites = find(lumina2().pipe).sites
    assert {(site.heads, site.kv_heads, site.separable_heads) for site in sites} == {(4, 2, True)}
    with pytest.raises(ValueError, match=r"kv_heads=3.*divisor"):
        Site("blocks.0.attn", 4, 8, 32, kv_heads=3)


def shown(*lengths):
    return torch.arange(TEXT + 2).lt(torch.tensor(lengths)[:, None])


def test_prompts_of_other_lengths_in_one_batch_are_refused():
    """Images begin at several positions."""
    bench = lumina2()
    model = find(bench.pipe)
    plan = plan_of(bench, model, [[FULL] * len(model.sites)] * STEPS, guided=False)
    inputs = bench.inputs(images=2, guidance=1.0, prompt_attention_mask=shown(TEXT - 1, TEXT))
    with ah.applied(bench.pipe, plan), pytest.raises(InputsInvalid, match="prompts of 6, 7 tokens in one batch"):
        bench.pipe(**inputs)
    with pytest.raises(InputsInvalid, match="prompts of 6, 7 tokens in one batch"):
        ah.search(bench.pipe, inputs, threshold=0.7, progress=False)


def test_guidance_that_ends_early_is_refused():
    bench = lumina2()
    with pytest.raises(InputsInvalid, match=r"cfg_trunc_ratio=0\.5.*leave it out"):
        ah.search(bench.pipe, bench.inputs(cfg_trunc_ratio=0.5), threshold=0.7, progress=False)
