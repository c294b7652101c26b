"""What a watched generation holds: said beforehand, and counted while it runs; in closed form for FLUX."""

import gc

import pytest
import torch
from budget import flux
from families import MORE
from pipelines import BENCHES, JOINT
from test_stack import blocks_of

import arrowhead as ah
from arrowhead.models.find import find
from arrowhead.plans.layout import Branches, Site, Tokens
from arrowhead.searches.stack.held import output_bytes
from arrowhead.searches.stack.watch import HELD

WATCHED = {**BENCHES, **JOINT, "flux": flux, **MORE}


def tensors():
    return [each for each in gc.get_objects() if type(each) is torch.Tensor]


class Outputs:
    """Tensors like the last block's output of the visual tokens that are alive when a step ends, by their memory."""

    def __init__(self, bench):
        self.most, self.shape = 0, None
        self.before = {id(each): each for each in tensors()}  # what other tests left
        model = find(bench.pipe, {"stack"})
        self.hooks = [
            blocks_of(t, model)[0].register_forward_pre_hook(self.began, with_kwargs=True) for t in model.transformers
        ]
        self.own, bench.pipe.scheduler.step = bench.pipe.scheduler.step, self.stepped
        self.scheduler = bench.pipe.scheduler

    def began(self, _, args, kwargs):
        self.shape = (args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))).shape

    def stepped(self, *args, **kwargs):
        out = self.own(*args, **kwargs)
        alive = [each for each in tensors() if id(each) not in self.before and each.shape == self.shape]
        found = {each.untyped_storage().data_ptr(): each.nelement() * each.itemsize for each in alive}
        self.most = max(self.most, sum(found.values()))
        return out

    def close(self):
        for hook in self.hooks:
            hook.remove()
        del self.scheduler.step


@pytest.mark.parametrize(("name", "steps"), [("dit", 6), ("flux", 20), ("wan", 5), ("wan22", 6), ("z_image", 4)])
@pytest.mark.parametrize("images", [1, 2])
def test_what_is_held_is_said_beforehand(name, steps, images):
    bench = WATCHED[name](torch.float32)
    if name == "z_image":
        images = 1
    inputs = {"steps": steps, "images": images, "seed": 2}
    said = ah.profile_bytes(bench.pipe, bench.inputs(**inputs))
    held = Outputs(bench)
    try:
        ah.profile(bench.pipe, bench.inputs(**inputs), progress=False)
    finally:
        held.close()
    assert said == held.most > 0


def test_flux_at_1024_pixels():
    """One picture takes less than half of a GiB: 20 times 4096 tokens of 3072 channels in 16 bits."""
    stack = Site("transformer_blocks+single_transformer_blocks", heads=1, head_dim=3072, channels=3072, kind="stack")
    tokens = Tokens(4096, 512, text_first=True)
    one = output_bytes(stack, tokens, Branches("cond_first", guided=False), 1, 2)
    assert one == 4096 * 3072 * 2
    assert HELD * one <= 2**29
