"""The fused kernel as torch sees it (operators, graphs, FLOPs), and what `api` refuses."""

import pytest
import torch
import torch._dynamo
from launches import DEVICE, DTYPE, SMALL, arrow, attended, close, full_and_residual, inputs, interpreted
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from arrowhead.errors import KernelUnavailable
from arrowhead.kernels import dispatch
from arrowhead.kernels.call import Call, Policy
from arrowhead.kernels.triton import api, launch_table, ops
from arrowhead.kernels.triton.launch_table import CACHED, FULL
from arrowhead.plans.layout import Tokens

TOKENS = Tokens(20, 5, True)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(launch_table, "chosen", lambda *_, **__: SMALL)


def operands(x, op):
    buffers = (x.out,) if op is ops.arrow else (x.out, x.residual)
    residual = (x.residual,) if op is ops.arrow else ()
    return *buffers, x.q, x.k, x.v, x.policy, *residual, x.seen, *x.image, x.scale


@pytest.mark.parametrize("op", [ops.arrow, ops.full_and_residual], ids=["arrow", "full_and_residual"])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(op, masked):
    x = inputs(TOKENS, [FULL, 3], batch=1, adds=[0, 1])
    x.seen = torch.ones(1, 25, dtype=torch.bool, device=DEVICE) if masked else None
    torch.library.opcheck(op, operands(x, op))


def counting():
    """A backend that runs graphs as they are, and counts them."""
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    return backend, graphs


def test_policies_of_every_step_are_one_graph():
    """Policies, precisions too, are data: a plan that changes from step to step is compiled once."""
    torch._dynamo.reset()
    backend, graphs = counting()
    x = inputs(TOKENS, [FULL] * 3, batch=1, eights=[0] * 3)

    @torch.compile(backend=backend, fullgraph=True)
    def step(q, policy):
        ops.arrow(x.out, q * 1, x.k, x.v, policy, x.residual, x.seen, *x.image, x.scale)
        return x.out * 2

    for radii in ([FULL, 2, 5], [3, 0, FULL], [FULL, 19, 4], [1, CACHED, 2], [CACHED] * 3):
        before = x.out.clone()
        eights = [radius in {2, 4, FULL} for radius in radii]
        x.policy = torch.tensor([*zip(radii, [0] * 3, eights, strict=True)], dtype=torch.int32, device=DEVICE)
        out = step(x.q, x.policy)
        wanted = attended(x, TOKENS, radii)
        for head, radius in enumerate(radii):
            close(out[:, head], 2 * (before if radius == CACHED else wanted)[:, head])
    assert len(graphs) == 1


def test_outputs_with_residuals_are_one_graph_too():
    torch._dynamo.reset()
    backend, graphs = counting()
    x = inputs(TOKENS, [4, 1], batch=1)
    step = torch.compile(full_and_residual, backend=backend, fullgraph=True)
    for radius in (4, 9, 2):
        x.policy[:, 0] = radius
        step(x)
        whole, window = attended(x, TOKENS, [FULL] * 2), attended(x, TOKENS, [radius] * 2)
        close(x.residual, (whole - window)[:, :, TOKENS.visual_slice])
    assert len(graphs) == 1


def kept(radius):
    """The query–key pairs of a head, counted one by one."""
    visual = [(i, j) for i in range(20) for j in range(20) if radius == FULL or abs(i - j) <= radius]
    return 0 if radius == CACHED else len(visual) + 25 * 25 - 20 * 20


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_flops_are_those_of_the_policy():
    radii = [FULL, 3, CACHED, 40, 0]
    x = inputs(TOKENS, radii, batch=2, dim=72)
    assert counted(lambda: arrow(x)) == 2 * 4 * 72 * sum(map(kept, radii))
    assert counted(lambda: full_and_residual(x)) == 2 * 4 * 72 * 4 * 25**2


def test_flops_of_tensors_without_values_are_those_of_full_attention():
    x = inputs(TOKENS, [3, CACHED], batch=2)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        faked = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in operands(x, ops.arrow)]
        assert counted(lambda: ops.arrow(*faked)) == 2 * 2 * 4 * 64 * 25**2


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("k", lambda x: x.k[:, :, 1:]),
        ("v", lambda x: x.v.double()),
        ("out", lambda x: x.out[:1]),
        ("policy", lambda x: x.policy.long()),
        ("policy", lambda x: x.policy[:1]),
        ("residual", lambda x: x.residual[:, :, 1:]),
        ("seen", lambda x: torch.ones(2, 25, device=DEVICE)),
        ("strides", lambda x: x.q.mT.contiguous().mT),
    ],
)
def test_operands_that_would_read_beyond_memory_are_refused(name, wrong):
    x = inputs(TOKENS, [FULL, 3])
    setattr(x, "q" if name == "strides" else name, wrong(x))
    with pytest.raises(ValueError, match=f"{name}.*wanted"):
        arrow(x)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_dispatch_agrees_with_the_reference(masked, scale):
    x = inputs(TOKENS, [FULL] * 3)
    mask = None
    if masked:
        mask = torch.rand(2, 1, 1, 25, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.6
        mask[..., 0] = True
    radii = [None, 4, 10**10]
    got, wanted = (dispatch.arrow(x.q, x.k, x.v, TOKENS, radii, scale=scale, mask=mask, kernel=kernel)
                   for kernel in ("fused", "reference"))  # fmt: skip
    close(got, wanted)
    assert got.stride() == x.q.stride()


@pytest.mark.parametrize("kernel", ["fused", "chunked"])
@pytest.mark.parametrize("adds", [(0, 2), (1, 2), (0, 1, 2)])
def test_residuals_are_added_to_some_heads(kernel, adds):
    """By the fused kernel while it writes, by `dispatch` for others. Residuals of other heads may hold NaN."""
    x = inputs(TOKENS, [FULL] * 3)
    policies = (Policy(), Policy(4), Policy(2))
    x.residual[:, [head for head in range(3) if head not in adds]] = torch.nan
    wanted = dispatch.attend(Call(x.q, x.k, x.v, TOKENS, policies, 0.2), "reference")
    for head in adds:
        wanted[:, head, TOKENS.visual_slice] += x.residual[:, head]
    close(dispatch.attend(Call(x.q, x.k, x.v, TOKENS, policies, 0.2, residual=x.residual, adds=adds), kernel), wanted)


def test_a_last_dimension_with_gaps_is_copied():
    x = inputs(TOKENS, [FULL])
    q = x.q.mT.contiguous().mT
    close(dispatch.arrow(q, x.k, x.v, TOKENS, 3, kernel="fused"), dispatch.arrow(q, x.k, x.v, TOKENS, 3, kernel="reference"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": torch.float64}, "got torch.float64, wanted"),
        ({"dim": 32}, "got head dim 32, wanted one of 64, 72, 80, 96, 128"),
        ({"scale": -1.0}, "got scale -1.0, wanted one above 0"),
        ({"mask": (2, 1, 25, 25)}, r"got a torch.bool mask of shape \(2, 1, 25, 25\), wanted a boolean mask of keys"),
        ({"mask": (2, 2, 1, 25)}, "wanted a boolean mask of keys"),
        ({"mask": (25, 25)}, "wanted a boolean mask of keys"),
        ({"mask": (2, 1, 1, 25), "mask_dtype": DTYPE}, f"got a {DTYPE} mask"),
        ({"gradient": True}, "got queries, keys or values that require a gradient, wanted inference"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_and_auto_takes_another(change, said):
    dim, dtype = change.get("dim", 64), change.get("dtype", DTYPE)
    q, k, v = torch.randn(3, 2, 2, 25, dim, device=DEVICE, dtype=dtype).unbind()
    mask = torch.ones(change["mask"], dtype=change.get("mask_dtype", torch.bool), device=DEVICE) if "mask" in change else None
    q.requires_grad_(change.get("gradient", False))
    scale = change.get("scale")
    with pytest.raises(KernelUnavailable, match=said) as refused:
        dispatch.arrow(q, k, v, TOKENS, 3, scale=scale, mask=mask, kernel="fused")
    assert "chunked" in str(refused.value)
    dispatch.arrow(q, k, v, TOKENS, 3, scale=scale, mask=mask)


@pytest.mark.parametrize("which", ["k", "v"])
def test_gradients_are_refused(which):
    x = inputs(TOKENS, [FULL])
    getattr(x, which).requires_grad_()
    with pytest.raises(KernelUnavailable, match="require a gradient"):
        dispatch.arrow(x.q, x.k, x.v, TOKENS, 3, kernel="fused")
    with torch.no_grad():
        dispatch.arrow(x.q, x.k, x.v, TOKENS, 3, kernel="fused")


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_tensors_of_inference_mode(mode):
    with torch.inference_mode():
        x = inputs(TOKENS, [FULL] * 3)
    with mode():
        q, k, v = x.q, x.k, x.v
        close(*(dispatch.arrow(q, k, v, TOKENS, [None, 4, 9], kernel=kernel) for kernel in ("fused", "reference")))


def test_every_policy_of_a_large_plan_is_copied_once():
    plan = [(Policy(radius), Policy()) for radius in range(57 * 50)]  # FLUX's sites in fifty steps
    first, second = ([api._policy(own, (), torch.device(DEVICE)) for own in plan] for _ in range(2))
    assert all(a is b for a, b in zip(first, second, strict=True))


@interpreted
def test_tensors_on_a_cpu_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    x = inputs(TOKENS, [FULL])
    with pytest.raises(KernelUnavailable, match="got tensors on cpu, wanted a CUDA device; move the pipeline there"):
        dispatch.arrow(x.q, x.k, x.v, TOKENS, 3, kernel="fused")


@interpreted
def test_bfloat16_is_refused_where_the_interpreter_multiplies_it_wrongly():
    q = torch.randn(1, 1, 25, 64).bfloat16()
    with pytest.raises(KernelUnavailable, match="bfloat16"):
        dispatch.arrow(q, q, q, TOKENS, 3, kernel="fused")


def test_a_machine_without_triton(monkeypatch):
    monkeypatch.setattr(api, "find_spec", lambda _: None)
    x = inputs(TOKENS, [FULL])
    with pytest.raises(KernelUnavailable, match=r"got no triton.*pip install arrowhead\[gpu\]"):
        dispatch.arrow(x.q, x.k, x.v, TOKENS, 3, kernel="fused")


class CudaTensor:
    """A stand-in for a tensor on a CUDA device."""

    is_cuda, device, shape = True, torch.device("cuda:0"), (2, 3, 25, 72)

    def __init__(self, dtype=torch.bfloat16, requires_grad=False):
        self.dtype, self.requires_grad = dtype, requires_grad


def picked(*tensors, precision="native", mask=None):
    """The kernel that "auto" chooses for these queries, keys and values; for ordinary ones where none are given."""
    q, k, v = tensors or [CudaTensor()] * 3
    return dispatch.resolve("auto", Call(q, k, v, TOKENS, (Policy(), Policy(3, precision), Policy(3)), 0.1, mask))


@pytest.mark.parametrize(
    ("capability", "kernel"), [((7, 5), "chunked"), ((8, 0), "fused"), ((8, 9), "fused"), ((9, 0), "fused")]
)
def test_auto_on_devices(monkeypatch, capability, kernel):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert picked() == picked(precision="int8") == kernel
    assert picked(mask=torch.ones(1, 1, 25, 25)) == "chunked"
    assert picked(*[CudaTensor(torch.float32)] * 3) == "chunked"


@pytest.mark.parametrize("which", range(3))
def test_auto_loses_no_gradient(monkeypatch, which):
    """Neither of queries nor of keys or values."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    tensors = [CudaTensor(requires_grad=i == which) for i in range(3)]
    assert picked(*tensors) == "chunked"
    with torch.no_grad():
        assert picked(*tensors) == "fused"


def test_auto_without_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(api, "find_spec", lambda _: None)
    assert picked() == "chunked"
