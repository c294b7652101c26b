"""Compiles the fused kernel for GPUs that need not be there, and says what the machine code is like. Run as a program.

Arguments: compute capability as a number, head dim, and, as 0 or 1, whether outputs come with residuals, whether keys are
masked, whether scores are in int8, whether one configuration is enough. Prints a list in JSON with what the table's
configurations became. A program, since under the tests Triton interprets.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from arrowhead.kernels import int8
from arrowhead.kernels.triton.kernel import arrow_kernel
from arrowhead.kernels.triton.launch_table import AMPERE, HEAD_DIMS, HOPPER, INT8_TAIL, SPECIALISED
from arrowhead.kernels.triton.rounding import rounding_kernel

PROGRAMS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COUNTED = ("HGMMA", "HMMA", "IGMMA", "IMMA", "UTMALDG", "STL", "LDL")


def source(dim, config, split, seen, int8, unit=8, dtype="bf16"):
    """The kernel with the types of its arguments, as a launch has them."""
    width, tail = HEAD_DIMS[dim]
    tma = config.variant != "pointers"
    pointer, strides = f"*{dtype}", ("i32",) * 3

    def operand(name, columns):
        own = "i8" if int8 and name != "v" else dtype
        return f"tensordesc<{own}[1, 1, {config.queries if name == 'q' else config.keys}, {columns}]>" if tma else f"*{own}"

    types = {
        "out": pointer,
        **{name: operand(name, width) for name in "qkv"},
        **{f"{name}_tail": operand(name, (INT8_TAIL if int8 and tail and name != "v" else tail) or width) for name in "qkv"},
        **(dict.fromkeys(["q_scales", "k_scales"], "*fp32") if int8 else {}),
        "policy": "*i32",
        "residual": pointer,
        **({"seen": "*i1"} if seen else {}),
        **{f"{name}_strides": strides for name in ("out", "q", "k", "v", "residual")},
        "seen_strides": ("i32", "i32"),
        **dict.fromkeys(["n", "visual", "visual_start"], "i32"),
        "scale": "fp32",
    }
    constants = {
        **({} if seen else {"seen": None}),
        **({} if int8 else {"q_scales": None, "k_scales": None}),
        **{"UNIT": unit, "DIM": dim, "WIDTH": width, "TAIL": tail, "M": config.queries, "T": config.keys},
        **{"TMA": tma, "SPECIALISED": config.variant == "specialised", "SPLIT": split, "COLUMNS": 3 if int8 else 2},
    }
    names = arrow_kernel.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if str(types.get(name)).startswith("*")}
    return ASTSource(arrow_kernel, {name: types.get(name, "constexpr") for name in names}, constants, aligned)


def report(capability, dim, config, split, seen, int8):
    """Registers, shared memory, seconds, and how often some instructions stand in the machine code."""
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source(dim, config, split, seen, int8), target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        code, usage = (
            subprocess.run([PROGRAMS / "cuobjdump", what, binary], capture_output=True, text=True, check=True)
            for what in ("-sass", "-res-usage")
        )
    return {
        **asdict(config),
        "capability": capability,
        "dim": dim,
        "split": split,
        "seen": seen,
        "int8": int8,
        "registers": int(re.search(r"REG:(\d+)", usage.stdout + usage.stderr)[1]),
        "shared": compiled.metadata.shared,
        **{name: len(re.findall(rf"\b{name}\b", code.stdout)) for name in COUNTED},
        "narrow": len(re.findall(r"\bLDGSTS\.E\.(?:U16|LTC)|\bLDG\.E\.U16", code.stdout)),
        "wide": len(re.findall(r"\bLDGSTS\.E\.BYPASS\.128", code.stdout)),
    }


def compile_rounding(capability, dim, dtype="bf16"):
    """What makes whole numbers of queries, and of keys, which have a mean."""
    width = HEAD_DIMS[dim][0] + (HEAD_DIMS[dim][1] and INT8_TAIL)
    pointers = {"values": "*i8", "scales": "*fp32", "x": f"*{dtype}", "mean": "*fp32", "policy": "*i32"}
    types = {**pointers, "x_strides": ("i32",) * 3, "n": "i32"}
    for rows in (int8.QUERIES, int8.KEYS):
        constants = {"DIM": dim, "WIDTH": width, "COLUMNS": triton.next_power_of_2(width), "ROWS": rows}
        constants |= {"mean": None} if rows == int8.QUERIES else {}
        signature = {name: "constexpr" if name in constants else types[name] for name in rounding_kernel.arg_names}
        own = ASTSource(rounding_kernel, signature, constants)
        triton.compile(own, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})


if __name__ == "__main__":
    capability, dim, *flags = (int(argument) for argument in sys.argv[1:])
    split, seen, int8, fast = map(bool, flags)
    rows = [table[dim] for table in ([HOPPER, AMPERE] if capability >= 90 else [AMPERE])]
    configs = [config for row in rows for config in ([row.spare] if split or seen else [row.short, row.long])]
    if capability >= 90 and not (split or seen or int8):
        configs.append(SPECIALISED[dim])
    if fast:
        configs = configs[:1]
    if int8:
        compile_rounding(capability, dim)
    print(json.dumps([report(capability, dim, config, split, seen, int8) for config in dict.fromkeys(configs)]))
