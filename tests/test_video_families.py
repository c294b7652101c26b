"""What is particular to single families of videos: guiders, and calls of the transformer beside those of the two branches."""

import pytest
import torch.nn.functional as F
from diffusers import AdaptiveProjectedGuidance, ClassifierFreeGuidance, PerturbedAttentionGuidance
from family_replay import Replayed, random_cells, replaying
from replay import distance, trace
from test_families import INNER, STEPS, plan_of
from untouched import left_as_it_was
from video_benches import chrono_edit, hunyuan_video15, ltx2

import arrowhead as ah
from arrowhead.errors import InputsInvalid
from arrowhead.models.find import find

MORE_CALLS = {"stg_scale": 1.0, "modality_scale": 2.0, "spatio_temporal_guidance_blocks": [0]}


def test_ltx2s_further_calls_run_in_full(monkeypatch):
    """Guidance by perturbed blocks and by separate modalities: the plan holds in the calls with both branches alone."""
    bench, beside = ltx2(), []
    model = find(bench.pipe, INNER)
    cells = random_cells(1, model.sites, STEPS, share=True)
    own, attention = Replayed.__call__, Replayed.attention
    with left_as_it_was(bench, **MORE_CALLS), ah.applied(bench.pipe, plan_of(bench, model, cells)) as run:
        given = trace(bench, bench.inputs(**MORE_CALLS))
        assert f"{2 * STEPS} calls of the transformer beside the steps' own" in run.summary().notes[0]
    monkeypatch.setattr(Replayed, "__call__", lambda self, run, given=None: run() if beside[-1] else own(self, run, given))

    def attend(self, q, k, v, mask, scale):
        return (
            F.scaled_dot_product_attention(q, k, v, mask, scale=scale) if beside[-1] else attention(self, q, k, v, mask, scale)
        )

    monkeypatch.setattr(Replayed, "attention", attend)

    def note(_, __, call):
        beside.append(call["isolate_modalities"] or bool(call["spatio_temporal_guidance_blocks"]))

    with bench.pipe.transformer.register_forward_pre_hook(note, with_kwargs=True), replaying(bench, model.modules, cells, True):
        wanted = trace(bench, bench.inputs(**MORE_CALLS))
    assert beside == [False, True, True] * STEPS
    assert distance(given, wanted) < 1e-5
    assert distance(given, trace(bench, bench.inputs(**MORE_CALLS))) > 1e-2


@pytest.mark.parametrize("more", [{"stg_scale": 1.0}, {"audio_modality_scale": 3.0}], ids=str)
def test_searches_refuse_ltx2s_further_calls(more):
    bench = ltx2()
    with pytest.raises(InputsInvalid, match=rf"{next(iter(more))}=.*once more in each step.*leave it out"):
        ah.search(bench.pipe, bench.inputs(**more), threshold=0.5, progress=False)


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("make", [ClassifierFreeGuidance, AdaptiveProjectedGuidance])
def test_a_guider_says_whether_there_are_two_branches_and_at_which_scale(make, original):
    bench = hunyuan_video15()
    bench.pipe.guider = make(use_original_formulation=original)
    model = find(bench.pipe)
    for scale in (0.0, 0.5, 1.0, 3.0):
        call, calls = model.call_arguments((), bench.inputs(steps=1, guidance=scale)), []
        with bench.pipe.transformer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1)):
            bench.pipe(**bench.inputs(steps=1, guidance=scale))
        assert model.branches(call).calls == len(calls)
        assert model.guidance_scale(call, 0) == scale + original
    bench.pipe.guider.disable()
    assert not model.branches(call).guided


@pytest.mark.parametrize(
    ("guider", "said"),
    [
        (
            PerturbedAttentionGuidance(perturbed_guidance_layers=[0]),
            "got a PerturbedAttentionGuidance, which calls the transformer 3 times",
        ),
        (ClassifierFreeGuidance(start=0.3), r"start=0\.3 of the guider"),
        (ClassifierFreeGuidance(stop=0.7), r"stop=0\.7 of the guider"),
    ],
    ids=["three branches", "begins late", "ends early"],
)
def test_other_guiders_are_refused(guider, said):
    bench = hunyuan_video15()
    bench.pipe.guider = guider
    with pytest.raises(InputsInvalid, match=f"{said}.*leave it out"):
        ah.search(bench.pipe, bench.inputs(), threshold=0.5, progress=False)


def test_a_guider_that_ends_early_is_followed():
    bench = hunyuan_video15()
    model = find(bench.pipe)
    cells = random_cells(2, model.sites, STEPS, share=True)
    bench.pipe.guider = ClassifierFreeGuidance(stop=0.6)
    with (
        ah.applied(bench.pipe, plan_of(bench, model, cells)),
        pytest.warns(ah.errors.PlanAdapted, match="guidance ends before"),
    ):
        given = trace(bench, bench.inputs())
    with replaying(bench, model.modules, cells, True, ends=3):
        wanted = trace(bench, bench.inputs())
    assert distance(given, wanted) < 1e-5


def test_frames_that_chrono_edit_drops_are_refused():
    bench = chrono_edit()
    with pytest.raises(InputsInvalid, match=r"enable_temporal_reasoning=True.*leave it out"):
        ah.search(bench.pipe, bench.inputs(enable_temporal_reasoning=True), threshold=0.5, progress=False)
