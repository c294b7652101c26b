"""One plan under circumstances at random, all at once: right against a replay of the carried-over rows."""

import random
from dataclasses import replace

import pytest
from families import MORE
from family_replay import random_cells, replaying
from replay import distance, trace
from test_families import plan_of
from test_two_lengths import apart, of_lengths

import arrowhead as ah
from arrowhead.models.find import find

pytestmark = pytest.mark.filterwarnings("ignore::arrowhead.errors.ArrowheadWarning")
STEPS = 5


def drawn(draw, name, bench):
    """A call's arguments, its visual tokens, the lengths of its texts, and the step before which guidance ends, if it does."""
    steps, seed, images = draw.randint(1, 8), draw.randrange(1000), draw.randint(1, 2)
    height, width = draw.choice((48, 64, 96)), draw.choice((64, 80))
    lengths = draw.randint(1, 7), draw.randint(1, 7)
    more = {"steps": steps, "height": height, "width": width, "guidance": draw.choice((3.0, 3.0, 1.0))}
    if draw.random() < 0.6:
        more["sigmas"] = sorted((draw.uniform(0.02, 1) for _ in range(steps)), reverse=True)
    ends = None
    if name == "lumina2" and more["guidance"] > 1 and draw.random() < 0.5:
        more["cfg_trunc_ratio"] = draw.uniform(1 / steps, 1)
        ends = next((i for i in range(steps) if (i + 1) / steps > more["cfg_trunc_ratio"]), None)

    def inputs():
        return of_lengths(bench.inputs(seed=seed, images=images, **more), *lengths)

    return inputs, (height // 16) * (width // 16), lengths, more["guidance"] > 1, ends


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["qwen", "lumina2"])
def test_a_plan_under_random_circumstances(name, seed):
    draw, bench = random.Random(seed), MORE[name]()
    model, usual = find(bench.pipe), bench.visual
    own = plan_of(bench, model, random_cells(seed, model.sites, STEPS, share=True))
    bench.pipe(**bench.inputs())
    own = replace(own, target=replace(own.target, levels=find(bench.pipe).levels))
    assert own.resample(levels=own.target.levels, tokens=own.tokens) is own
    for _ in range(3):
        inputs, visual, lengths, guided, ends = drawn(draw, name, bench)
        with ah.applied(bench.pipe, own) as run:
            given = trace(bench, inputs())
            assert run.cache_bytes == 0
        levels = find(bench.pipe).levels
        rows = own.resample(tokens=replace(own.tokens, visual=visual), levels=levels).cells
        if guided and ends != 0 and lengths[0] != lengths[1]:
            rows = apart(rows, model.sites)
        bench.visual = visual
        with replaying(bench, model.modules, rows, guided and ends != 0, ends or None):
            wanted = trace(bench, inputs())
        bench.visual = usual
        assert distance(given, wanted) < 1e-5
