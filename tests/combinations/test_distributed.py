"""Several processes: what shares a transformer out is refused; prompts may be shared out, for searches."""

import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, ParallelConfig, TensorParallelConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import combines
from subjects import subject
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from untouched import parts

import arrowhead as ah
from arrowhead.calibration.sharding import Share
from arrowhead.errors import InputsInvalid, UnsupportedPipeline
from arrowhead.metrics.error import error_from_moments, error_moments, relative_squared_error

GROUP = "Distributed"


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def refused(here, plan, match):
    """By apply, searches, calibrate and analyze; nothing is changed."""
    inputs = here.inputs(0) if here.adapter is None else lambda: here.generate(0)
    before = parts(here.pipe) if here.adapter is None else None
    asked = [
        lambda: ah.apply(here.pipe, plan, here.adapter),
        here.search,
        lambda: here.search(threshold=0.3),
        lambda: ah.calibrate(here.pipe, inputs, adapter=here.adapter),
    ]
    for each in asked:
        with pytest.raises(UnsupportedPipeline, match=match):
            each()
    assert before is None or parts(here.pipe) == before


def configured(here, **config):
    """As enable_parallelism leaves it on the model."""
    here.transformer._parallel_config = ParallelConfig(**config)


@combines(GROUP, "Ulysses or ring context parallelism", "refused: a process has some of the heads, or of the tokens")
@pytest.mark.parametrize(
    ("degrees", "which"), [({"ulysses_degree": 2}, "Ulysses.*heads"), ({"ring_degree": 2}, "ring.*tokens")]
)
def test_context_parallelism(mechanism, outcome, degrees, which):
    here = subject(mechanism)
    plan = here.plan()
    wanted = here.compressed(plan, 1)
    with here.applied(plan):
        configured(here, context_parallel_config=ContextParallelConfig(**degrees))
        with pytest.raises(UnsupportedPipeline, match=rf"{which}.*wanted all heads and tokens in one process"):
            here.generate(1)
        here.transformer._parallel_config = None
        assert torch.equal(here.generate(1), wanted)
    configured(here, context_parallel_config=ContextParallelConfig(**degrees))
    refused(here, plan, which)


@combines(
    GROUP, "tensor parallelism, FSDP: weights that are DTensors", "refused: a process has some of the heads, or of the rows"
)
@pytest.mark.parametrize("by", ["distribute_tensor", "fully_shard", "config"])
def test_shared_out_weights(mechanism, outcome, by, alone):
    here = subject(mechanism)
    plan = here.plan()
    module = next(m for path, m in here.transformer.named_modules() if path.endswith(".attn"))
    if by == "config":
        configured(here, tensor_parallel_config=TensorParallelConfig(tp_degree=2))
    elif by == "fully_shard":
        fully_shard(module, mesh=alone)
    else:
        layer = next(m for m in module.modules() if isinstance(m, torch.nn.Linear))
        layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.data, alone, [Shard(0)]), requires_grad=False)
    refused(here, plan, "DTensors.*wanted all heads and tokens in one process")


SIZES = st.lists(st.integers(1, 3), min_size=1, max_size=4)


def shares(sizes, values):
    """One of each process, whose exchange is told beforehand."""

    class Told(Share):
        def each(self, value):
            mine = values[self.rank]
            assert value is mine or torch.equal(value, mine)
            return values

    return [Told(rank, tuple(sizes)) for rank in range(len(sizes))]


@settings(max_examples=50, deadline=None)
@given(sizes=SIZES, branches=st.integers(1, 2), seed=st.integers(0, 10**6))
def test_rows_come_together_branch_by_branch(sizes, branches, seed):
    whole = torch.randn(branches, sum(sizes), 3, generator=torch.Generator().manual_seed(seed))
    values = [part.flatten(0, 1) for part in whole.split(sizes, 1)]
    for share, value in zip(shares(sizes, values), values, strict=True):
        assert torch.equal(share.joined(value), whole.flatten(0, 1))
        assert torch.equal(share.own(whole[0]), value[: len(value) // branches])


@settings(max_examples=50, deadline=None)
@given(sizes=SIZES, branches=st.integers(1, 2), seed=st.integers(0, 10**6))
def test_pooled_errors_are_those_of_all(sizes, branches, seed):
    """The mean that an error is relative to is that of all images, wherever they are."""
    generator = torch.Generator().manual_seed(seed)
    full = 3 + torch.randn(branches * sum(sizes), 2, 5, 4, generator=generator)
    full = full * (1 + torch.arange(len(full)))[:, None, None, None]
    other = full + torch.randn(full.shape, generator=generator)
    counts = [size * branches for size in sizes]
    values = [error_moments(a, b) for a, b in zip(full.split(counts), other.split(counts), strict=True)]
    for share, value in zip(shares(sizes, values), values, strict=True):
        pooled = error_from_moments(share.pooled(value))
        torch.testing.assert_close(pooled, relative_squared_error(full, other), rtol=1e-4, atol=1e-6)


def test_without_a_process_group(tmp_path):
    here = subject("sd3")
    given = processes.inputs_of(here)
    before = parts(here.pipe)
    for look in (ah.search, ah.calibrate):
        with pytest.raises(InputsInvalid, match=r"without a process group.*accelerate launch"):
            look(here.pipe, given, shard=processes.shard_of(given), progress=False)
    assert parts(here.pipe) == before


@combines(GROUP, "prompts of a search shared out", {"own": "refused: a callable that generates cannot be split"})
def test_a_loop_of_ones_own_is_not_split(mechanism, outcome, alone):
    here = subject(mechanism)
    with pytest.raises(InputsInvalid, match=r"STDiT2.*a callable that generates cannot be split"):
        here.search(shard=["y"])


def test_one_process_has_all_prompts(alone):
    here, there = subject("sd3"), subject("sd3")
    given = processes.inputs_of(here)
    asked = {"progress": False, **processes.SEARCHES["headwise"]}
    assert ah.search(here.pipe, given, shard=processes.shard_of(given), **asked) == ah.search(there.pipe, given, **asked)


def launched(folder, asked, *, by_torchrun=False):
    """What each of two processes found."""
    script, paths = str(Path(processes.__file__)), os.pathsep.join(sys.path)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    if by_torchrun:
        how = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]  # `accelerate launch` on CPUs needs MPI
        running = [subprocess.Popen([sys.executable, *how, script, "launch", str(folder / "out"), *asked], env=env)]
    else:
        command = [sys.executable, script, str(folder / "store"), str(folder / "out"), *asked]
        ranks = ({"RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2))
        running = [subprocess.Popen(command, env=env | rank) for rank in ranks]
    try:
        assert [each.wait(timeout=540) for each in running] == [0] * len(running)
    finally:
        for each in running:
            each.kill()
    return [torch.load(folder / f"out{rank}", weights_only=False) for rank in range(2)]


def check(results, asked):
    """The same in both, and as one process finds it with all prompts."""
    first, second = results
    for name, what in (each.split(":") for each in asked):
        mine, other, wanted = first[name][what], second[name][what], processes.found(name, [what])[what]
        if what == "table":
            assert torch.equal(mine.outputs, other.outputs)
            assert torch.equal(mine.residuals, other.residuals)
            torch.testing.assert_close(mine.outputs, wanted.outputs, rtol=1e-4, atol=1e-6 * wanted.outputs.abs().max().item())
            torch.testing.assert_close(mine.residuals, wanted.residuals, rtol=1e-4, atol=1e-6)
            for field in ("sampler_gains", "model_feedback", "final", "other_flops"):
                assert getattr(mine, field) == getattr(other, field)
                assert getattr(mine, field) == pytest.approx(getattr(wanted, field), rel=1e-4)
            assert (mine.images, mine.regions, mine.target) == (wanted.images, wanted.regions, wanted.target)
        else:
            assert mine.text() == other.text()
            assert mine == wanted
            assert {*wanted.count()} != {"full"}


@combines(GROUP, "prompts of a search shared out", {"sd3": "works"})
def test_two_processes(mechanism, outcome, tmp_path):
    """Three prompts, two in one process and one in the other; and what cannot be split is refused in both."""
    asked = ["sd3:headwise", "sd3:budget"]
    results = launched(tmp_path, asked)
    check(results, asked)
    said = {
        "lengths": "entries.*wanted lists or tensors of one length",
        "few": "at least one prompt for each process",
        "noise": "nothing of the noise",
        "unnamed": "nothing of the noise",
        "several": "num_images_per_prompt.*repeat the prompts",
        "no name": "wanted names",
        "unsplit": r"2 images of 1 prompts in process \d.*in `shard`",
        "others": "other guidance_scale in process 1",
        "speedup": "seconds are each process's own",
        "gradients": "wanted gradients",
    }
    for found in results:
        assert found["refused"].keys() == said.keys()
        for what, pattern in said.items():
            with pytest.raises(AssertionError, match=pattern):
                raise AssertionError(found["refused"][what])


@combines(GROUP, "prompts of a search shared out, with accelerate's PartialState", dict.fromkeys(("sd3", "flux"), "works"))
@pytest.mark.slow
def test_all_searches_under_accelerate(mechanism, outcome, tmp_path):
    asked = [f"{mechanism}:{what}" for what in (*processes.SEARCHES, "table")]
    check(launched(tmp_path, asked, by_torchrun=True), asked)
