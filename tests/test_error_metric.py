"""The relative error against its formula, element by element."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from independent import few

from arrowhead.metrics.error import relative_error

FORMS = ["paper", "signed"]
every_form = pytest.mark.parametrize("form", FORMS)
halves = st.integers(-8, 8).map(lambda i: i / 2)  # of all signs, and exact in every dtype


def by_loop(reference, output, form):
    """Σ clip(|a − b| / (max(…) + 1e-6), 0, 10) / count, in Python's floats."""
    errors = []
    for a, b in zip(reference.flatten().tolist(), output.flatten().tolist(), strict=True):
        larger = max(abs(a), abs(b)) if form == "paper" else max(a, b)
        errors.append(min(max(abs(a - b) / (larger + 1e-6), 0.0), 10.0))
    return math.fsum(errors) / len(errors)


@every_form
@few
@given(pairs=st.lists(st.tuples(halves, halves), min_size=1, max_size=24))
def test_is_the_formula(form, pairs):
    a, b = torch.tensor(pairs).unbind(-1)
    assert relative_error(a, b, form) == pytest.approx(by_loop(a, b, form), rel=1e-5, abs=1e-7)


@every_form
def test_is_the_formula_on_tensors_of_any_shape(form):
    a, b = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7)
    assert relative_error(a, b, form) == pytest.approx(by_loop(a, b, form), rel=1e-4)


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(form, dtype):
    a = torch.randn(4, 64).to(dtype)
    b = (a.float() * 1.01).to(dtype)  # differences that half precision itself would round away
    assert relative_error(a, b, form) == pytest.approx(by_loop(a, b, form), rel=1e-4)
    assert isinstance(relative_error(a, b, form), float)


@every_form
def test_identical_tensors_have_no_error(form):
    a = torch.randn(3, 11)
    assert relative_error(a, a.clone(), form) == 0
    assert relative_error(torch.zeros(5), torch.zeros(5), form) == 0
    at_the_pole = torch.tensor([-1e-6, 1.0])  # where the signed form's denominator is nothing
    assert relative_error(at_the_pole, at_the_pole.clone(), form) == 0


def test_paper_form_is_symmetric_and_at_most_two():
    a, b = torch.randn(500), torch.randn(500)
    assert relative_error(a, b) == relative_error(b, a) <= 2
    assert relative_error(a, -a) == pytest.approx(2, rel=1e-3)


@every_form
def test_zero_against_a_value_is_a_whole_error(form):
    assert relative_error(torch.zeros(4), torch.full((4,), 3.0), form) == pytest.approx(1)


@pytest.mark.parametrize(
    ("a", "b", "paper", "signed"),
    [
        (2.0, 1.0, 0.5, 0.5),  # both positive: alike
        (1.0, -2.0, 1.5, 3.0),  # opposite signs: the smaller magnitude is below the line
        (-1.0, -2.0, 0.5, 0.0),  # both negative: a negative quotient, clipped to nothing
        (-2.0, 0.0, 1.0, 10.0),  # zero and negative: 2 / 1e-6, clipped
        (0.1, -5.0, 5.1 / 5.0, 10.0),  # 51, clipped
        (0.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_two_forms_part_where_signs_do(a, b, paper, signed):
    for one, other in ((a, b), (b, a)):
        x, y = torch.tensor([one]), torch.tensor([other])
        assert relative_error(x, y) == relative_error(x, y, "paper") == pytest.approx(paper, rel=1e-4)
        assert relative_error(x, y, "signed") == pytest.approx(signed, rel=1e-4)


def test_each_element_is_clipped_before_the_mean():
    a, b = torch.tensor([0.1, 1.0]), torch.tensor([-5.0, 1.0])
    assert relative_error(a, b, "signed") == pytest.approx((10 + 0) / 2)
