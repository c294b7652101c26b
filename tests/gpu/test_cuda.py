"""What needs a GPU: the kernels and the engine there, against the float32 oracle and the untouched pipeline."""

from dataclasses import replace

import pytest
import torch
from pipelines import dit
from replay import assert_identical, compressed, plan, trace

import arrowhead as ah
from arrowhead.kernels import dispatch
from arrowhead.kernels.call import Call, Policy
from arrowhead.kernels.triton.launch_table import CACHED, FULL
from arrowhead.plans.layout import Tokens

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


@pytest.mark.parametrize("cache_dtype", ["native", "int8", "fp8"])
def test_caches_on_the_cpu_change_no_bit(cache_dtype):
    """Sent by pinned memory without waiting, and back: heads, residuals, outputs and slopes, of one branch and of both."""
    bench = dit(torch.float16)
    bench.pipe.to("cuda")
    mixed = plan(bench, ["FFF", "WXV", "WCW", "CwR", "VYR"])
    with ah.applied(bench.pipe, mixed, cache_dtype=cache_dtype):
        wanted = trace(bench, bench.inputs())
    with ah.applied(bench.pipe, mixed, cache_dtype=cache_dtype, cache_device="cpu"):
        assert_identical(trace(bench, bench.inputs()), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128])
@pytest.mark.parametrize(
    "tokens", [Tokens(1024), Tokens(1000, 77), Tokens(333, 12, True), Tokens(4096, 512, True), Tokens(2300, 154)], ids=str
)
def test_the_fused_kernel_agrees_with_the_oracle(dtype, dim, tokens):
    """Both of its operators with the configurations that are shipped for this device, and what they leave alone."""
    pytest.importorskip("triton", reason="Triton is not installed: the fused kernel cannot run")

    from arrowhead.kernels.triton import ops

    radii, adds, visual = [FULL, 0, tokens.visual // 8, 60, CACHED], [0, 1, 1, 0, 1], tokens.visual_slice
    q, k, v, out = (torch.randn(2, tokens.total, 5, dim, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(4))
    residual = torch.randn(2, 5, tokens.visual, dim, device="cuda", dtype=dtype)
    policy = torch.tensor([*zip(radii, adds, strict=True)], dtype=torch.int32, device="cuda")
    seen = torch.rand(2, tokens.total, device="cuda") < 0.9
    seen[:, tokens.text_slice.start if tokens.text else slice(None)] = True
    image, scale = (tokens.visual, visual.start), dim**-0.5

    def oracle(radii):
        wanted = [None if radius in {FULL, CACHED} else radius for radius in radii]
        single = [  # of one sample at a time: it makes (H, N, N) in float32
            dispatch.arrow(
                *(t[b : b + 1].float() for t in (q, k, v)), tokens, wanted, mask=seen[b, None, None], kernel="reference"
            )
            for b in range(2)
        ]
        return torch.cat(single)

    whole, banded, before, left = oracle([FULL] * 5), oracle(radii), out.clone(), residual.clone()
    with_residual = banded.clone()
    with_residual[:, [1, 2], visual] += residual[:, [1, 2]].float()
    ops.arrow(out, q, k, v, policy, residual, seen, *image, scale)
    torch.testing.assert_close(out[:, :4].float(), with_residual[:, :4], rtol=2e-2, atol=2e-2)
    assert torch.equal(out[:, 4], before[:, 4])
    ops.full_and_residual(out, residual, q, k, v, policy, seen, *image, scale)
    torch.testing.assert_close(out[:, :4].float(), whole[:, :4], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(residual[:, 1:4].float(), (whole - banded)[:, 1:4, visual], rtol=2e-2, atol=2e-2)
    assert torch.equal(out[:, 4], before[:, 4])
    assert torch.equal(residual[:, [0, 4]], left[:, [0, 4]])


@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128])
def test_every_shipped_configuration_agrees_with_the_oracle(dim, monkeypatch):
    """Those that the table chooses without a mask or residuals to write, too, and those that nothing chooses yet."""
    pytest.importorskip("triton", reason="Triton is not installed: the fused kernel cannot run")
    from launches import arrow, attended, full_and_residual, inputs

    from arrowhead.kernels.triton import launch_table
    from arrowhead.kernels.triton.launch_table import AMPERE, HOPPER, SPECIALISED

    hopper = torch.cuda.get_device_capability()[0] == 9
    rows = [AMPERE[dim], *([HOPPER[dim]] if hopper else [])]
    configs = [config for row in rows for config in (row.short, row.long, row.spare)]
    tokens = Tokens(2300, 154, True)
    radii = [FULL, 0, 287, 60]
    x = inputs(tokens, radii, dim, dtype=torch.bfloat16)
    wanted, whole = attended(x, tokens, radii), attended(x, tokens, [FULL] * 4)
    for config in dict.fromkeys([*configs, *([SPECIALISED[dim]] if hopper else [])]):
        monkeypatch.setattr(launch_table, "chosen", lambda *_, own=config, **__: own)
        x.out.fill_(torch.nan)
        arrow(x, residual=False)
        torch.testing.assert_close(x.out.float(), wanted, rtol=2e-2, atol=2e-2, msg=lambda text, own=config: f"{own}: {text}")
    for row in rows:
        monkeypatch.setattr(launch_table, "chosen", lambda *_, own=row.spare, **__: own)
        full_and_residual(x)
        torch.testing.assert_close(x.out.float(), whole, rtol=2e-2, atol=2e-2)
        left = (whole - wanted)[:, 1:, tokens.visual_slice]
        torch.testing.assert_close(x.residual[:, 1:].float(), left, rtol=2e-2, atol=2e-2)


def test_auto_takes_the_fused_kernel():
    pytest.importorskip("triton", reason="Triton is not installed: the fused kernel cannot run")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this device is older than Ampere")
    q, k, v = torch.randn(3, 2, 3, 600, 72, device="cuda", dtype=torch.bfloat16).unbind()
    policies = Policy(), Policy(50), Policy(50, "int8")
    call = Call(q, k, v, Tokens(600), policies, 72**-0.5)
    assert dispatch.resolve("auto", call) == "fused"
    wanted = dispatch.attend(replace(call, q=q.float(), k=k.float(), v=v.float()), "reference")
    torch.testing.assert_close(dispatch.attend(call).float(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128])
@pytest.mark.parametrize("tokens", [Tokens(1000, 77), Tokens(4096, 512, True)], ids=str)
def test_heads_in_int8_agree_with_the_oracle(dtype, dim, tokens):
    """Beside native ones, with residuals and under a mask: the fused kernel by the configurations for this device."""
    pytest.importorskip("triton", reason="Triton is not installed: the fused kernel cannot run")
    from launches import arrow, attended, inputs, random_keys

    radii, adds = [FULL, tokens.visual // 8, 60, FULL, CACHED], [0, 1, 0, 0, 1]
    for masked in (False, True):
        x = inputs(tokens, radii, dim, batch=1, dtype=dtype, adds=adds, eights=[1, 1, 1, 0, 0])
        x.seen = random_keys(tokens, radii, 1) if masked else None
        before = x.out.clone()
        arrow(x)
        wanted = attended(x, tokens, radii)
        wanted[:, 1, tokens.visual_slice] += x.residual[:, 1].float()
        wanted[:, 4] = before[:, 4].float()
        torch.testing.assert_close(x.out.float(), wanted, rtol=2e-2, atol=2e-2)
