"""One of several processes: searches on its part of the prompts, by gloo.

Run as `processes.py STORE OUT [NAME:SEARCH ...]`, with RANK and WORLD_SIZE set; STORE is a file, or `launch` under
`torchrun`, where accelerate's PartialState finds what it needs.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
import torch.distributed as dist
from accelerate import PartialState
from diffusers.utils import logging
from pipelines import dit
from subjects import subject

import arrowhead as ah
from arrowhead.errors import InputsInvalid

PROMPTS, STEPS = 3, 4
KINDS = ("self_attention", "feed_forward")
EXTENT = ah.Extent(radii=(2, 5), ages=2, kinds=KINDS)
SEARCHES = {
    "greedy": {"strategy": "greedy", "threshold": 0.3},
    "headwise": {"strategy": ah.Headwise(radii=(2, 5), share_cfg=True), "threshold": 0.5},
    "budget": {"budget": ah.Budget(transformer_flops=0.7, corrections=1), "extent": EXTENT},
    "error": {"budget": ah.Budget(error=0.5, granularity="step"), "extent": EXTENT},
}


def inputs_of(here):
    """Prompts of all processes, and a generator for each."""
    given = here.inputs(7, images=PROMPTS, steps=STEPS)
    return given | {"generator": [torch.Generator().manual_seed(seed) for seed in range(PROMPTS)]}


def shard_of(given):
    return [name for name in given if "embeds" in name] + ["generator"]


def found(name, searches, shard=False):
    """A plan by each search, or a table."""
    here = subject(name)
    given = inputs_of(here)
    split = {"shard": shard_of(given), "progress": False} if shard else {"progress": False}
    results = {}
    for what in searches:
        if what == "table":
            results[what] = ah.calibrate(here.pipe, given, extent=ah.Extent(radii=(2,), ages=2, vectors=2), **split)
        else:
            results[what] = ah.search(here.pipe, given, **split, **SEARCHES[what])
    return results


def refusals():
    """What cannot be split, on a pipeline in this process: what errors say."""
    here = subject("sd3")
    given = inputs_of(here)
    shard = shard_of(given)
    few = {name: value[:1] if name in shard else value for name, value in given.items()}
    one = torch.Generator().manual_seed(0)
    asked = {
        "lengths": (given | {"prompt_embeds": given["prompt_embeds"][:2]}, shard, {}),
        "few": (few, shard, {}),
        "noise": (given | {"generator": one}, shard[:-1], {}),
        "unnamed": ({n: v for n, v in given.items() if n != "generator"}, shard[:-1], {}),
        "several": (given | {"num_images_per_prompt": 2}, shard, {}),
        "no name": (given, "prompt_embeds", {}),
        "others": (given | {"guidance_scale": 3.0 + dist.get_rank()}, shard, {}),
        "speedup": (given, shard, {"budget": ah.Budget(speedup=1.2)}),
        "gradients": (given, shard, {"extent": ah.Extent(gradients=False)}),
    }
    asked = {what: (here.pipe, *each) for what, each in asked.items()}
    whole, generators = dit(), [torch.Generator().manual_seed(seed) for seed in range(2)]
    asked["unsplit"] = whole.pipe, whole.inputs(images=2, generator=generators), ["generator"], {"threshold": 0.3}
    said = {}
    for what, (pipe, inputs, names, more) in asked.items():
        try:
            ah.search(pipe, inputs, shard=names, progress=False, **more)
        except InputsInvalid as error:
            said[what] = str(error)
        except Exception as error:
            said[what] = f"another error: {error!r}"
    return said


def main(store, out, *asked):
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if store == "launch":
        PartialState(cpu=True)
    else:
        limit = timedelta(seconds=300)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    assert dist.get_backend() == "gloo"
    of_name = {}
    for name, what in (each.split(":") for each in asked):
        of_name.setdefault(name, []).append(what)
    what = {name: found(name, searches, shard=True) for name, searches in of_name.items()} | {"refused": refusals()}
    torch.save(what, f"{out}{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
