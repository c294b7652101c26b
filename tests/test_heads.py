"""Indices of heads: a slice or a tensor for each set of them, made once."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from arrowhead.kernels.head_index import head_index

some = st.sets(st.integers(0, 9), min_size=1).map(lambda heads: tuple(sorted(heads)))


@given(some)
def test_an_index_picks_these_heads(heads):
    x = torch.randn(2, 10, 3)
    assert torch.equal(x[:, head_index(heads, x.device)], torch.stack([x[:, head] for head in heads], 1))


def test_an_order_is_kept():
    assert head_index((3, 1, 2), torch.device("cpu")).tolist() == [3, 1, 2]


def test_neighbours_are_a_view_and_others_are_copied_to_the_device_once():
    x = torch.randn(2, 10, 3)
    assert x[:, head_index((4, 5, 6), x.device)].data_ptr() == x[:, 4].data_ptr()
    assert head_index((1, 5), x.device) is head_index((1, 5), x.device)
