"""Machines other than this one, as far as they can be stood in for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matrix import states

TESTS = Path(__file__).parents[1]

BARE = """
import sys
sys.modules |= dict.fromkeys(("triton", "typer", "rich", "jinja2", "matplotlib", "torchmetrics"))  # as if not installed
import torch
import arrowhead as ah
pipe = ah.tiny.load("dit")
inputs = dict(class_labels=[1, 7], num_inference_steps=3)
plan = ah.search(pipe, inputs, budget=ah.Budget(module_flops=0.6), progress=False)
generate = lambda: pipe(**inputs, generator=torch.Generator().manual_seed(0), output_type="pt").images
raw = generate()
with ah.applied(pipe, plan) as run:
    made = generate()
    assert run.summary().flops.module < 0.7
assert not torch.equal(made, raw) and torch.equal(generate(), raw)
try:
    with ah.applied(pipe, ah.search(pipe, inputs, threshold=0.5, progress=False), kernel="fused"):
        generate()
except ah.errors.KernelUnavailable as error:
    assert "triton" in str(error), error
"""

APPLE = """
import json, sys
import torch
import arrowhead as ah
from apple import There, back, machine, moved
import pipelines
from replay import plan as uniform_plan

bench = getattr(pipelines, sys.argv[1])(torch.float32)
plan = uniform_plan(bench, ["FFF", "RWC", "VVW", "Wwv", "FRF"])
full = uniform_plan(bench, ["FFF"] * 5)
searches = [dict(threshold=0.2), dict(strategy="headwise", threshold=0.6)]
searches.append(dict(budget=ah.Budget(module_flops=0.5), extent=ah.Extent(gradients=False, precisions=("int8",))))

def everything(inputs):
    def made(of=None):
        if of is None:
            return back(bench.pipe(**inputs())[0])
        with ah.applied(bench.pipe, of):
            return back(bench.pipe(**inputs())[0])
    found = {"raw": made(), "full": made(full), "plan": made(plan)}
    plans = [ah.search(bench.pipe, inputs(), progress=False, **how) for how in searches]
    found["searches"] = [plan.cells for plan in plans[:2]]  # a budget's may differ where two are as good
    assert plans[2].flops().module <= 0.5
    found["mass"] = ah.analyze(bench.pipe, inputs(), progress=False).band_mass
    return found

kinds = {"output_type": "latent"} if sys.argv[1] != "dit" else {"output_type": "np"}
here = everything(lambda: bench.inputs() | kinds)
for module in (bench.pipe.transformer, getattr(bench.pipe, "vae", None)):
    if module is not None:
        moved(module)
with machine():
    there = everything(lambda: {k: There(v) if isinstance(v, torch.Tensor) else v for k, v in bench.inputs().items()} | kinds)

def off(name):
    a, b = (torch.as_tensor(found[name]).double() for found in (here, there))
    return float((a - b).norm() / a.norm())

print(json.dumps({
    "off": {name: off(name) for name in ("raw", "plan", "mass")},
    "full": bool((torch.as_tensor(there["full"]) == torch.as_tensor(there["raw"])).all()),
    "changed": bool((torch.as_tensor(there["plan"]) != torch.as_tensor(there["raw"])).any()),
    "searches": [a == b for a, b in zip(here["searches"], there["searches"])],
}))
"""


def said(code, *arguments):
    whole = f"import sys; sys.path.insert(0, {str(TESTS)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", whole, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@states("Machines", "CPU alone, without triton and what the command line needs", "works")
def test_a_bare_machine():
    said(BARE)


@states("Machines", "Apple's MPS", "works: in a stand-in that has no float64, gradients left out; no Mac has run it")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_a_stand_in_for_apple(name):
    """Plans, three searches and an analysis: what the CPU gives, and no float64 or tensor of another device on the way."""
    found = json.loads(said(APPLE, name).splitlines()[-1])
    assert max(found["off"].values()) < 1e-4, found
    assert found["full"]
    assert found["changed"]
    assert all(found["searches"]), found
