"""All configurations of the launch table compile without a GPU: to tensor cores' instructions, without spilled registers."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from arrowhead.kernels.triton.launch_table import HEAD_DIMS

if find_spec("triton") is None:
    pytest.skip("Triton is not installed: the fused kernel cannot be compiled", allow_module_level=True)

HERE = Path(__file__).parent
SHARED = {80: 99 * 1024, 90: 227 * 1024}  # bytes of a program; those of sm_86 and sm_89, which run what is compiled for sm_80
REGISTERS = 255


def reports(tmp_path, capability, dim, *, split=False, seen=False, int8=False, fast=False):
    """What `compiles.py` prints, from a process in which Triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    arguments = [
        sys.executable,
        HERE / "compiles.py",
        *(str(int(value)) for value in (capability, dim, split, seen, int8, fast)),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(report):
    mine, other = ("HGMMA", "HMMA") if report["capability"] == 90 else ("HMMA", "HGMMA")
    assert report[mine] > 0, report
    assert (report[mine.replace("H", "I", 1)] > 0) == report["int8"], report
    assert report[other] == 0, report
    assert report["STL"] == report["LDL"] == 0, report
    assert report["registers"] <= REGISTERS, report
    if report["variant"] == "pointers":
        assert report["wide"] > 0, report  # 16 bytes at once, though 72 is no multiple of 16
        assert report["narrow"] == report["UTMALDG"] == 0, report
    else:
        assert report["UTMALDG"] > 0, report
    if report["variant"] != "pointers" or report["capability"] == 80:
        assert report["shared"] <= SHARED[report["capability"]], report


@pytest.mark.parametrize("capability", [80, 90])
def test_a_configuration_for_each_architecture(tmp_path, capability):
    (report,) = reports(tmp_path, capability, 72, fast=True)
    check(report)


@pytest.mark.slow
@pytest.mark.parametrize("seen", [False, True], ids=["every key", "masked keys"])
@pytest.mark.parametrize("split", [False, True], ids=["attention", "with residuals"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("capability", [80, 90])
def test_every_configuration(tmp_path, capability, dim, split, seen):
    """On sm_90 also those for tensors that descriptors cannot describe."""
    found = reports(tmp_path, capability, dim, split=split, seen=seen)
    assert found
    for report in found:
        print(json.dumps(report))
        check(report)


@pytest.mark.slow
@pytest.mark.parametrize("seen", [False, True], ids=["every key", "masked keys"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("capability", [80, 90])
def test_every_configuration_in_int8(tmp_path, capability, dim, seen):
    """Scores by tensor cores' integer instructions, all else as before."""
    for report in reports(tmp_path, capability, dim, seen=seen, int8=True):
        print(json.dumps(report))
        check(report)
