"""Hundreds of generations with whatever befalls them, in threads, too: nothing that they made stays alive."""

import functools
import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from test_interrupted import SUBJECTS, interrupted_at, put_right
from torch import Tensor

import arrowhead as ah
from arrowhead.errors import AlreadyGenerating, ArrowheadError

SLACK, BYTES = 500, 1000
"""Objects and bytes that may be more: what the latest interrupt left half done may be alive, but not that of two of them."""


class Stop(Exception):
    """What interrupts a generation."""


class Mixed:
    """One subject with its plan on, and what is done to it at random."""

    def __init__(self, name):
        self.here, self.draw, self.done = SUBJECTS[name](), random.Random(7), dict.fromkeys(range(6), 0)
        self.untouched = self.here.generate()
        self.apply()
        self.wanted = self.here.generate()

    def apply(self):
        self.run = ah.apply(self.here.pipe, self.here.plan, self.here.adapter)

    def in_two_threads(self):
        together = threading.Barrier(2, timeout=60)

        def generate():
            together.wait()
            with suppress(AlreadyGenerating):
                return self.here.generate()

        with ThreadPoolExecutor(2) as pool:
            found = [done.result(60) for done in [pool.submit(generate), pool.submit(generate)]]
        assert any(one is not None for one in found)
        assert all(one is None or torch.equal(one, self.wanted) for one in found)

    def stopped_in_a_module(self):
        error, place = self.draw.choice([Stop, KeyboardInterrupt]), self.draw.randrange(8)
        modules = [module for module in self.transformer.modules() if isinstance(module, torch.nn.Linear)]

        def stop(*_):
            raise error

        hook = modules[place % len(modules)].register_forward_hook(stop)
        with suppress(Stop, KeyboardInterrupt, ArrowheadError):  # a forward of an adapter is compared with the module's first
            self.here.generate()
        hook.remove()

    def interrupted_at_a_line(self):
        work = self.draw.choice([self.here.generate, self.again, self.here.search])
        with suppress(KeyboardInterrupt, ArrowheadError), interrupted_at(self.draw.randrange(600)):
            work()
        put_right(self.here)
        self.apply()

    def again(self):
        ah.remove(self.here.pipe)
        self.apply()

    def refused(self):
        with pytest.raises(ArrowheadError):
            self.apply()

    @property
    def transformer(self):
        return self.here.pipe if self.here.adapter is not None else self.here.pipe.transformer

    def plain(self):
        assert torch.equal(self.here.generate(), self.wanted)

    def once(self):
        works = self.plain, self.in_two_threads, self.stopped_in_a_module, self.interrupted_at_a_line, self.again, self.refused
        which = self.draw.randrange(len(works))
        works[which]()
        self.done[which] += 1
        assert self.run.cache_bytes == 0

    def alive(self):
        """The number of objects, and the bytes of all tensors, after a generation with a plan that was just applied."""
        self.again()
        self.plain()
        return alive()


def alive():
    """The number of objects, and the bytes of all tensors, without what caches of bounded size hold."""
    for cached in [each for each in gc.get_objects() if type(each) is functools._lru_cache_wrapper]:
        if str(cached.__module__).startswith("arrowhead"):
            cached.cache_clear()
    gc.collect()
    objects = gc.get_objects()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in objects if type(t) is Tensor}
    return len(objects), sum(storages.values())


@pytest.mark.filterwarnings("ignore::arrowhead.errors.GenerationUnfinished")
@pytest.mark.parametrize(("early", "late"), [(30, 75), pytest.param(50, 300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["processors", "blocks", "custom model"])
def test_nothing_grows(name, early, late):
    mixed = Mixed(name)
    for _ in range(early):
        mixed.once()
    before = mixed.alive()
    for _ in range(late - early):
        mixed.once()
    after = mixed.alive()
    assert after[1] <= before[1] + BYTES, (before, after)
    assert after[0] <= before[0] + SLACK, (before, after)
    assert min(mixed.done.values()) >= late // 20, mixed.done
    ah.remove(mixed.here.pipe)
    assert torch.equal(mixed.here.generate(), mixed.untouched)
