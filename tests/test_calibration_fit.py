"""What a calibration may choose by itself to fit the memory: the inputs that can be split, all processes alike, and limits."""

import weakref
from types import SimpleNamespace

import pytest
import torch

import arrowhead as ah
from arrowhead.calibration.driver import PipelineDriver
from arrowhead.calibration.sharding import Part, one_by_one
from arrowhead.errors import CalibrationFitted, InputsInvalid
from arrowhead.searches.budget.sensitivity import footprint, recording

PROMPTS = {"prompt": ["a", "b", "c"], "generator": [torch.Generator() for _ in range(3)]}


@pytest.mark.parametrize(
    "more",
    [
        {"image": ["first", "second", "third"]},
        {"image": ["reference", "another"]},
        {"image": torch.zeros(3, 8, 8)},
        {"image": object()},
        {"mask_image": torch.zeros(2, 1, 8, 8)},
        {"control_image": [torch.zeros(3, 8, 8)] * 3},
        {"video": [object()] * 5},
        {"guidance": torch.ones(3)},
    ],
    ids=", ".join,
)
def test_arguments_that_may_be_shared_are_not_split(more):
    with pytest.raises(InputsInvalid, match=f"one after another with {next(iter(more))}, .*; wanted .*; run all at once"):
        one_by_one(PROMPTS | more)


def test_arguments_of_prompts_are_split_and_others_given_to_all():
    embeds, mask = torch.rand(3, 4, 2), torch.ones(3, 4)
    given = PROMPTS | {"negative_prompt_embeds": embeds, "negative_prompt_attention_mask": mask, "prompt_2": ["d", "e", "f"]}
    others = {"image_guidance_scale": 1.5, "num_frames": 3, "num_images_per_prompt": 1, "mask": None, "sigmas": [1.0, 0.5]}
    for i, (own, share) in enumerate(one_by_one(given | others)):
        assert {name: own.pop(name) for name in others} == others
        assert own.keys() == given.keys()
        assert all(list(own[name]) == [given[name][i]] for name in ("prompt", "prompt_2", "generator"))
        assert torch.equal(own["negative_prompt_embeds"], embeds[i : i + 1])
        assert torch.equal(own["negative_prompt_attention_mask"], mask[i : i + 1])
        assert (share.rank, share.sizes) == (i, (1, 1, 1))


def required(monkeypatch, free, share, others=()):
    """What this process chooses with so many bytes free, and what it tells the others, whose choices are `others`."""
    told = []

    class Several(Part):
        alone = False

        def each(self, value):
            told.append(value)
            return [value, *others]

    driver = SimpleNamespace(share=Several() if share else Part(), one_by_one=lambda: [None])
    needs = {(False, "native"): 100, (True, "native"): 50, (True, "int8"): 20}
    monkeypatch.setattr(recording, "footprint_of", lambda *_: ([], [], None, 2, 4, torch.device("cpu")))
    monkeypatch.setattr(recording, "free_bytes", lambda _: free)
    monkeypatch.setattr(recording, "needed_bytes", lambda extent, *_: needs[extent.checkpoint, extent.cache_dtype])
    model = SimpleNamespace(transformers=[SimpleNamespace(enable_gradient_checkpointing=None)])
    try:
        recording._require_fit(driver, model, SimpleNamespace(branches=SimpleNamespace(calls=1)), ah.Extent())
    except recording._DoesNotFit as found:
        return found.extent, told
    return ah.Extent(), told


def test_all_processes_take_the_smallest_extent_of_any(monkeypatch):
    frees = (1000, 60, None, 30)
    alone = [required(monkeypatch, free, share=False)[0] for free in frees]
    small = ah.Extent(checkpoint=True, cache_dtype="int8")
    assert alone == [ah.Extent(), ah.Extent(checkpoint=True), ah.Extent(), small]
    told = [required(monkeypatch, free, share=True)[1][0] for free in frees]
    for i, free in enumerate(frees):
        assert required(monkeypatch, free, True, told[:i] + told[i + 1 :])[0] == small
    assert required(monkeypatch, 1000, True, [told[0], told[2]])[0] == ah.Extent()


def test_the_first_run_is_gone_when_the_second_begins(monkeypatch):
    runs = []

    class Tensors:
        pass

    def _record(_driver, extent, *_, **fits):
        if fits:
            held = Tensors()
            runs.append(weakref.ref(held))
            raise recording._DoesNotFit(ah.Extent(checkpoint=True), "too large")
        return extent, runs[0]()

    monkeypatch.setattr(recording, "_record", _record)
    with pytest.warns(CalibrationFitted, match="too large"):
        assert recording.record(PipelineDriver(None, {})) == (ah.Extent(checkpoint=True), None)


@pytest.mark.parametrize(
    ("limit", "above", "wanted"),
    [
        ("max", "max", 8192),
        ("5000", "max", 5000 - 3000 + 500),
        ("5000", "4000", 1500),
        ("1000", "max", 0),
        ("99999999", "max", 8192),
    ],
)
def test_free_bytes_keep_to_the_limits_of_cgroups(limit, above, wanted, monkeypatch, tmp_path):
    monkeypatch.setattr(footprint, "PROC", tmp_path)
    monkeypatch.setattr(footprint, "CGROUPS", tmp_path / "groups")
    inner = tmp_path / "groups/outer/inner"
    for folder, most in ((inner, limit), (inner.parent, above)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text("3000\n")
        (folder / "memory.stat").write_text("anon 2000\ninactive_file 500\n")
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 8 kB\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("1:cpu:/elsewhere\n0::/outer/inner\n")
    assert footprint.free_bytes(torch.device("cpu")) == wanted
