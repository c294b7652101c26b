"""What is read is what was written, to the precision of what it is kept in: by rounding each number by hand."""

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from independent import few

from arrowhead.engine import cache_encoding
from arrowhead.engine.cache import Cache, Entry, Key, encode_output
from arrowhead.engine.cache_encoding import NATIVE, CacheEncoding
from arrowhead.errors import InputsInvalid
from arrowhead.plans.layout import Branches

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))


def drawn(seed, *shape, spread=1.0):
    """Numbers of very different sizes from token to token, of both signs."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw) * (spread * torch.randn(*shape[:-1], 1, generator=draw)).exp()


def nearest_fp8(x):
    """To 4 significant bits, or to the step of the smallest numbers, 2⁻⁹; halves to even."""
    step = 2.0 ** max(math.floor(math.log2(abs(x))) - 3, -9) if x else 1.0
    return round(x / step) * step


def by_hand(x, width, cache_dtype):
    """Each token's numbers in runs of `width`, the largest of which is 127 or 448."""
    most, nearest = {"int8": (127, round), "fp8": (448, nearest_fp8)}[cache_dtype]
    found = x.double().clone().reshape(-1, width)
    for run in found:
        unit = run.abs().max().float() / most
        for place, number in enumerate(run.float()):
            run[place] = nearest(float(number / unit)) * float(unit) if unit else 0.0
    return found.reshape(x.shape)


@few
@given(shape=shapes, heads=st.integers(1, 4), seed=st.integers(0, 10**6), name=st.sampled_from(["int8", "fp8"]), data=st.data())
def test_a_token_is_rounded_by_its_heads(shape, heads, seed, name, data):
    batch, tokens, width = shape
    dtype = data.draw(st.sampled_from(DTYPES))
    value = drawn(seed, batch, tokens, heads * width, spread=2.0).to(dtype)
    value[0, 0] = 0
    there = CacheEncoding(name).stored(value, width)
    assert there.values.dtype == cache_encoding.EIGHT_BITS[name][0]
    assert sum(tensor.nbytes for tensor in there.tensors) == value.numel() + 4 * batch * tokens * heads
    read = there.read()
    assert (read.dtype, read.device, read.shape) == (value.dtype, value.device, value.shape)
    torch.testing.assert_close(read, by_hand(value, width, name).to(dtype), rtol=torch.finfo(dtype).eps + 1e-6, atol=0)
    assert not read[0, 0].any()


@pytest.mark.parametrize(("name", "off"), [("int8", 0.5 / 127), ("fp8", 2**-4)])
def test_no_number_is_further_off_than_half_a_step(name, off):
    value = drawn(3, 2, 3, 50, 8, spread=3.0)  # of heads: (B, h, N, D)
    read = CacheEncoding(name).stored(value, 8).read()
    largest = value.abs().amax(-1, keepdim=True)
    assert ((read - value).abs() <= 1.001 * off * largest).all()
    assert ((read - value).abs() > 0.5 * off * value.abs()).any()


def test_what_is_no_multiple_of_a_head_shares_one_scale():
    value = drawn(0, 1, 4, 7)
    there = CacheEncoding("int8").stored(value, 3)
    assert there.scales.shape == (1, 4, 1)
    torch.testing.assert_close(there.read(), by_hand(value, 7, "int8").float())


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_numbers_that_are_not_finite_show(name, wrong):
    value = drawn(1, 1, 2, 8)
    value[0, 0, 5] = wrong
    read = CacheEncoding(name).stored(value, 4).read()
    assert not read[0, 0, 4:].isfinite().any()
    assert read[0, 0, :4].isfinite().all()
    assert read[0, 1].isfinite().all()


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_the_smallest_numbers_become_small_ones(name):
    value = torch.full((1, 1, 4), 1e-44)
    value[0, 0, 1] = 1e-37
    read = CacheEncoding(name).stored(value, 4).read()
    assert read.isfinite().all()
    assert float(read.abs().max()) == pytest.approx(1e-37, rel=1e-3)
    assert CacheEncoding(name).stored(torch.full((1, 1, 4), 1e-44), 4).read().abs().max() < 2e-43


def test_native_is_the_tensor_itself():
    value = drawn(2, 2, 3, 4)
    assert NATIVE.stored(value, 4).read() is value
    assert CacheEncoding("native", torch.device("cpu")).stored(value, 4).read() is value


ENCODINGS = [CacheEncoding(name) for name in ("native", "int8", "fp8")]


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.dtype)
@pytest.mark.parametrize("order", ["cond_first", "uncond_first"])
def test_branches_of_a_pair_are_what_each_is_by_itself(encoding, order):
    """Of an output for image and text, and of one that gives no text: for both branches, one of two, and one for both."""
    branches = Branches(order, guided=True)
    image, text = drawn(4, 4, 5, 6), drawn(5, 4, 2, 6)
    rounded = [encoding.stored(t, 3).read() for t in (image, text)]
    half = slice(0, 2) if order == "cond_first" else slice(2, 4)
    cache = Cache(branches)
    cache.write(Key("a"), Entry(encode_output((image, text), 3, encoding), conditional_only=False, last_reader=9))
    cache.write(Key("b"), Entry(encode_output((image[half], None), 3, encoding), conditional_only=True, last_reader=9))
    assert all(map(torch.equal, cache.read(Key("a"), 1), rounded))
    assert all(map(torch.equal, cache.read(Key("a"), 2, conditional=True), (t[half] for t in rounded)))
    both, none = cache.read(Key("b"), 3)
    assert none is None
    assert torch.equal(both, torch.cat([rounded[0][half]] * 2))
    assert cache.held_bytes > 0
    cache.read(Key("a"), 9)
    cache.read(Key("b"), 9)
    assert (cache.entries, cache.held_bytes) == ({}, 0)


@few
@given(seed=st.integers(0, 10**6), encoding=st.sampled_from(ENCODINGS), data=st.data())
def test_heads_that_are_written_over_and_read_in_any_order(seed, encoding, data):
    """Against a dictionary of heads; what is held is what the tensors take, and no larger storage is kept alive."""
    heads, cache, key = 5, Cache(Branches("cond_first", guided=True)), Key("a", "heads")
    wanted = {}
    for turn in range(data.draw(st.integers(1, 4))):
        some = tuple(sorted(data.draw(st.sets(st.integers(0, heads - 1), min_size=1)))) if turn else tuple(range(heads))
        value = drawn(seed + turn, 2, len(some), 3, 4)
        cache.write(key, Entry(encode_output(value, 4, encoding), False, sys.maxsize, some))
        wanted |= dict(zip(some, encoding.stored(value, 4).read().unbind(1), strict=True))
    asked = data.draw(st.lists(st.integers(0, heads - 1), min_size=1, unique=True))
    assert torch.equal(cache.read_heads(key, asked, heads, 1), torch.stack([wanted[head] for head in asked], 1))
    tensors = [tensor for entry in cache.entries[key] for tensor in entry.tensors]
    assert cache.held_bytes == sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.dtype)
def test_what_is_sent_away_comes_back_before_it_is_looked_at(encoding, monkeypatch):
    """Nothing may be computed from what was sent to the CPU: it may not have arrived. `meta` stands for elsewhere."""
    elsewhere, here = torch.device("meta"), {}

    def moved(tensor, device):
        if device == elsewhere:
            away = tensor.to(elsewhere)
            here[id(away)] = away, tensor.clone()
            return away
        if tensor.device == elsewhere:
            return here[id(tensor)][1].clone()
        return tensor

    monkeypatch.setattr(cache_encoding, "to_device", moved)
    sent = CacheEncoding(encoding.dtype, elsewhere)
    value = drawn(6, 4, 3, 5, 4)
    there = sent.stored(value, 4)
    assert {tensor.device for tensor in there.tensors} == {elsewhere}
    wanted = encoding.stored(value, 4).read()
    assert torch.equal(there.read(), wanted)
    picked = there.heads((2, 0))
    assert {tensor.device for tensor in picked.tensors} == {elsewhere}
    assert torch.equal(picked.read(), wanted[:, [2, 0]])


@pytest.mark.parametrize("dtype", ["int4", "INT8", "", None])
def test_no_such_dtype(dtype):
    with pytest.raises(InputsInvalid, match=r"got cache_dtype=.*wanted one of native, int8, fp8"):
        CacheEncoding.of(dtype, None)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", 3.5, ""])
def test_no_such_device(device):
    with pytest.raises(InputsInvalid, match=r"got cache_device=.*wanted one that torch has here"):
        CacheEncoding.of("native", device)


def test_known_ones():
    assert CacheEncoding.of("native", None) == NATIVE
    assert CacheEncoding.of("fp8", "cpu") == CacheEncoding("fp8", torch.device("cpu"))
