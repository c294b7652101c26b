"""What needs a GPU: the kernels and the engine there, against the float32 oracle and the untouched pipeline."""

import pytest
import torch
from pipelines import dit
from replay import assert_identical, compressed, plan, trace

from arrowhead.kernels import dispatch
from arrowhead.layout import Tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("visual", "text", "radius"), [(1024, 0, 128), (1000, 77, 60), (333, 12, 0)])
def test_chunks_agree_with_the_oracle(dtype, visual, text, radius):
    tokens = Tokens(visual, text)
    q, k, v = (torch.randn(2, 3, tokens.total, 72, device="cuda", dtype=dtype) for _ in range(3))
    got = dispatch.arrow(q, k, v, tokens, radius, kernel="chunked")
    wanted = dispatch.arrow(q.float(), k.float(), v.float(), tokens, radius, kernel="reference")
    torch.testing.assert_close(got.float(), wanted, rtol=2e-2, atol=2e-2)


def test_a_full_plan_changes_no_bit():
    bench = dit(torch.float32)
    bench.pipe.to("cuda")
    full = plan(bench, ["FFF"] * 5)
    assert_identical(compressed(bench, full, bench.inputs()), trace(bench, bench.inputs()))
