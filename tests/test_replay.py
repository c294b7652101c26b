"""Compressed generations of diffusers pipelines, against the formulas replayed by hand: every step's output and the result."""

import pytest
import torch
from pipelines import BENCHES, dit, pixart_alpha, pixart_sigma
from replay import FAULTS, GRIDS, assert_same, compressed, distance, plan, random_grid, replay, trace
from seeds import seeds

BOTH = str.maketrans("CvVyY", "FwWxX")  # what a letter is when both branches are computed


def test_the_replay_without_compression_is_the_pipeline(bench):
    assert_same(replay(bench, ["FFF"] * 5, bench.inputs(images=2)), trace(bench, bench.inputs(images=2)))


@pytest.mark.parametrize("letter", "CREwvWVxyXY")
def test_every_technique_changes_what_is_drawn(bench, letter):
    """Otherwise the comparisons below would show nothing."""
    grid = ["FFF", "FFF", f"F{letter}F", "FFF", "FFF"]
    assert distance(replay(bench, grid, bench.inputs()), trace(bench, bench.inputs())) > 0.01


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_grid(bench, grid):
    inputs = {"seed": 3, "images": 2}
    assert_same(compressed(bench, plan(bench, grid), bench.inputs(**inputs)), replay(bench, grid, bench.inputs(**inputs)))


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("seed", seeds(5, 2))
def test_random_grid(bench, seed, images):
    grid = random_grid(seed + 10 * images, 7, bench.layers)
    inputs = {"seed": seed, "images": images, "steps": 7}
    got = compressed(bench, plan(bench, grid), bench.inputs(**inputs))
    assert_same(got, replay(bench, grid, bench.inputs(**inputs)))
    assert distance(got, trace(bench, bench.inputs(**inputs))) > 0.05


@pytest.mark.parametrize("seed", seeds(3))
def test_any_wrong_cell_would_show(bench, seed):
    """Swap one cell of a random grid for another in the replay: it is no longer what arrowhead gives."""
    grid = random_grid(seed, 4, bench.layers)
    inputs = {"seed": seed, "steps": 4}
    got = compressed(bench, plan(bench, grid), bench.inputs(**inputs))
    for step in range(4):
        for layer in range(bench.layers):
            row = grid[step]
            for letter in {"F", "w", "x"} - {row[layer]}:  # which read nothing from earlier steps
                wrong = [*grid[:step], row[:layer] + letter + row[layer + 1 :], *grid[step + 1 :]]
                if not all(column_can_run(column) for column in zip(*wrong, strict=True)):
                    continue
                if layer == 0 and not bench.conditional_first and row[0].translate(BOTH) == letter:
                    continue  # PixArt's text comes in after the first self-attention: its branches are still the same
                assert distance(replay(bench, wrong, bench.inputs(**inputs)), got) > 1e-3, (grid, wrong)


def column_can_run(column):  # a line goes through two outputs; what is swapped in computes one
    read = [i for i, letter in enumerate(column) if letter in "WVXY"]
    full = [i for i, letter in enumerate(column) if letter in "FC"]
    return column[0] != "R" and (not read or (bool(full) and full[0] < read[0]))


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(bench, fault):
    """What may go wrong would be seen, and did not: the conditional half is computed, residuals are fresh, and so on."""
    grid = FAULTS[fault]
    inputs = {"seed": 5, "images": 2, "steps": len(grid)}
    right = replay(bench, grid, bench.inputs(**inputs))
    wrong = replay(bench, grid, bench.inputs(**inputs), fault=fault)
    got = compressed(bench, plan(bench, grid), bench.inputs(**inputs))
    assert distance(wrong, right) > 0.01
    assert distance(wrong, got) > 0.01
    assert_same(got, right)


@pytest.mark.parametrize("make", [dit, pixart_sigma], ids=["cond_first", "uncond_first"])
def test_shared_wa_rs_adds_the_conditional_residual(make):
    """With the other branch's the pictures are clearly others: the bug of the papers' code, in both orders."""
    bench, grid = make(), ["FFF", "VVV", "VVV", "VVV"]
    inputs = {"seed": 8, "images": 3, "steps": 4}
    got = compressed(bench, plan(bench, grid), bench.inputs(**inputs))
    assert distance(replay(bench, grid, bench.inputs(**inputs), fault="unconditional residual"), got) > 0.02
    assert_same(got, replay(bench, grid, bench.inputs(**inputs)))


@pytest.mark.parametrize("seed", seeds(3))
def test_without_guidance(bench, seed):
    """One branch in the batch: all of it is conditional."""
    grid = [row.translate(BOTH) for row in random_grid(seed, 5, bench.layers)]
    inputs = {"seed": seed, "images": 3, "guidance": 1.0}
    got = compressed(bench, plan(bench, grid, guided=False), bench.inputs(**inputs))
    assert len(got.outputs[0]) == 3
    assert_same(got, replay(bench, grid, bench.inputs(**inputs), guided=False))


@pytest.mark.parametrize("make", [pixart_alpha, pixart_sigma])
def test_images_per_prompt(make):
    bench, grid = make(), random_grid(4, 5, 3)
    inputs = {"seed": 2, "images": 2, "num_images_per_prompt": 2}
    got = compressed(bench, plan(bench, grid), bench.inputs(**inputs))
    assert len(got.result) == 4
    assert_same(got, replay(bench, grid, bench.inputs(**inputs)))


@pytest.mark.parametrize("make", [pixart_alpha, pixart_sigma])
@pytest.mark.parametrize(("height", "width"), [(16, 40), (40, 24), (8, 24)])
def test_other_shapes(make, height, width):
    bench, grid = make(), random_grid(height + width, 5, 3)
    inputs = {"seed": 1, "height": height, "width": width}
    visual = height // 4 * width // 4
    got = compressed(bench, plan(bench, grid, visual=visual), bench.inputs(**inputs))
    assert got.result.shape[2:] == (height // 2, width // 2)
    assert_same(got, replay(bench, grid, bench.inputs(**inputs)))


@pytest.mark.parametrize("make", [pixart_alpha, pixart_sigma])
def test_a_negative_prompt_keeps_its_effect(make):
    """Attention of the unconditional branch may be shared; what the negative prompt does to the pictures stays."""
    bench, grid = make(), ["FFF", "VCV", "CRC", "RVY"]
    got = [compressed(bench, plan(bench, grid), bench.inputs(steps=4, negative=negative)) for negative in range(2)]
    wanted = [replay(bench, grid, bench.inputs(steps=4, negative=negative)) for negative in range(2)]
    whole = [trace(bench, bench.inputs(steps=4, negative=negative)) for negative in range(2)]
    assert_same(got[0], wanted[0])
    assert_same(got[1], wanted[1])
    assert distance(got[0], got[1]) > 0.3 * distance(whole[0], whole[1]) > 0.01


@pytest.mark.parametrize("kernel", ["chunked", "reference"])
@pytest.mark.parametrize(("near", "far"), [(0, 1), (18, 70), (100, 142)])
def test_radii_and_kernels_over_many_tokens(kernel, near, far):
    """144 tokens: more than one chunk of queries, bands from a token to all but one."""
    bench, grid = dit(torch.float32, sample_size=24), ["FFF", "WXV", "YRw", "CFx", "WYR"]
    got = compressed(bench, plan(bench, grid, near, far), bench.inputs(), kernel=kernel)
    assert_same(got, replay(bench, grid, bench.inputs(), near, far), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", BENCHES)
def test_in_single_precision(name):
    bench, grid = BENCHES[name](torch.float32, seed=7), random_grid(7, 6, 3)
    inputs = {"seed": 7, "images": 2, "steps": 6}
    got = compressed(bench, plan(bench, grid), bench.inputs(**inputs))
    assert_same(got, replay(bench, grid, bench.inputs(**inputs)), rtol=1e-3, atol=1e-4)


def test_layers_are_told_apart():
    """Twelve layers, of which number 1, 10 and 11 begin alike."""
    bench = dit(num_layers=12)
    grid = random_grid(12, 5, 12)
    assert_same(compressed(bench, plan(bench, grid), bench.inputs()), replay(bench, grid, bench.inputs()))
