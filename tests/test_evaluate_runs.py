"""Evaluations of many images: by whom and in how many sittings they are made does not matter."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from families import wan22
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pipelines import tiny, tiny_mmdit
from torch import nn

import arrowhead as ah
from arrowhead.errors import InputsRepeated, TooFewSamples
from arrowhead.evaluation.metric_networks import Networks
from arrowhead.evaluation.request import Shard
from arrowhead.evaluation.resumable import measure
from arrowhead.evaluation.work_folder import SettingFolder
from arrowhead.metrics.distributions import frechet, moments
from arrowhead.metrics.images import psnr, ssim
from arrowhead.metrics.resize import tf1
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import FULL, Reuse
from arrowhead.plans.layout import Tokens

STEPS = 3
SIZE = 16
INPUTS = {"class_labels": [4, 1, 7], "num_inference_steps": STEPS, "guidance_scale": 2.0}
pytestmark = pytest.mark.filterwarnings("ignore::arrowhead.errors.TooFewSamples", "ignore::arrowhead.errors.InputsRepeated")


class Features(nn.Module):
    """Means of a few patches stand for Inception's features, and three numbers for its logits."""

    def forward(self, x):
        patches = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return patches, 3 * patches[:, :3]


def distance(a, b):
    return (a - b).abs().mean((1, 2, 3))


def brightness(images, prompts):
    return images.mean((1, 2, 3)) + torch.tensor([len(prompt) for prompt in prompts])


class Classifier(nn.Module):
    def forward(self, x):
        return torch.stack([x.mean((1, 2, 3)) * i % 0.3 for i in range(10)], 1)


NETWORKS = Networks(inception=Features(), lpips=distance, classifier=Classifier())


@dataclass
class Subject:
    """A pipeline that draws 16 × 16 pixels, two plans, and how many batches it was called for."""

    pipe: object = field(default_factory=lambda: tiny(torch.float32, sample_size=SIZE).pipe)
    calls: int = 0

    def __post_init__(self):
        self.pipe.transformer.register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))
        target = target_of(find(self.pipe))
        reuse = lambda *steps: ah.Plan(  # noqa: E731
            tuple((Reuse() if step in steps else FULL,) * len(target.sites) for step in range(STEPS)), target, Tokens(64), True
        )
        self.plans = {"one": reuse(1), "two": reuse(1, 2)}

    @property
    def batches(self):
        return self.calls // STEPS

    def measure(self, work, images=7, plans=None, inputs=INPUTS, **settings):
        asked = {"batch": 2, "networks": NETWORKS, "progress": False, **settings}
        return measure(self.pipe, self.plans if plans is None else plans, inputs, images=images, work=work, **asked)


def figures(found):
    """All but times and memory."""
    return {row.name: (row.estimates, row.cost.summary) for row in (found.raw, *found.rows)}


@pytest.fixture
def real(tmp_path):
    path = tmp_path / "real.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (9, 12, 20, 3), dtype=np.uint8))
    return f"{path}:images"


def by_hand(pipe, images, batch, plan):
    """What the pipeline gives for images with seeds 3, 4, …, in bytes, (n, 3, H, W)."""
    made = []
    for start in range(0, images, batch):
        places = range(start, min(start + batch, images))
        generators = [torch.Generator().manual_seed(3 + i) for i in places]
        call = {**INPUTS, "class_labels": [INPUTS["class_labels"][i % 3] for i in places], "generator": generators}
        if plan is None:
            made.append(pipe(**call, output_type="pt").images)
        else:
            with ah.applied(pipe, plan):
                made.append(pipe(**call, output_type="pt").images)
    return (torch.cat(made) * 255).round().byte()


def test_figures_are_those_of_images_generated_by_hand(tmp_path, real):
    subject = Subject()
    found = subject.measure(tmp_path / "work", seed=3, real=real)
    raw = by_hand(subject.pipe, 7, 2, None)
    theirs = torch.from_numpy(np.load(tmp_path / "real.npz")["images"]).permute(0, 3, 1, 2)
    features = lambda pixels: Features()((tf1(pixels.float(), 299) - 128) / 128)[0]  # noqa: E731
    for row, plan in zip((found.raw, *found.rows), (None, *subject.plans.values()), strict=True):
        made = by_hand(subject.pipe, 7, 2, plan)
        says = Classifier()(made / 255).argmax(-1)
        expected = {
            "fid": frechet(moments(features(made)), moments(features(theirs))),
            "accuracy": (says == torch.tensor([4, 1, 7, 4, 1, 7, 4])).float().mean().item(),
        }
        if plan is not None:
            a, b = made / 255, raw / 255
            expected |= {"psnr": psnr(a, b), "ssim": ssim(a, b), "lpips": distance(a * 2 - 1, b * 2 - 1).mean().item()}
            assert row.cost.attention_flops == pytest.approx(plan.flops().attention)
            assert row.cost.module_flops == pytest.approx(plan.flops().module)
            assert row.cost.peak_cache_bytes > 0
            assert row.cost.pairs == 4
        assert {name: row.estimates[name].value for name in expected} == pytest.approx(expected, rel=1e-4)
        assert set(row.estimates) == {*expected, "kid", "is"}
        assert [json.loads(p.read_text())["frames"] for p in (tmp_path / "work").glob(f"{row.name}*/batches/*.json")] == [1] * 4
    assert found.setting["seeds"] == {"first": 3, "last": 9}
    assert "TensorFlow" in found.setting["measures"]["inception"]
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_shards_give_one_s_figures(count, tmp_path, real):
    whole = Subject().measure(tmp_path / "whole", images=9, real=real)
    for index in reversed(range(count)):  # in whatever order
        assert Subject().measure(tmp_path / "parts", images=9, real=real, shard=Shard(index, count)) is None
    merging = Subject()
    found = merging.measure(tmp_path / "parts", images=9, real=real)
    assert merging.calls == 0
    assert figures(found) == figures(whole)
    for path in (tmp_path / "whole").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "parts" / path.relative_to(tmp_path / "whole")).read_bytes()


class Killed(BaseException):
    """As a signal would come."""


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(after=st.integers(1, 30))
def test_killed_and_gone_on_is_as_unbroken(after, tmp_path_factory):
    """The transformer, of which all make 33 calls with those before the first batch, stops after any number of them."""
    folder, subject = tmp_path_factory.mktemp("killed"), Subject()

    def stop(*_):
        if subject.calls >= after:
            raise Killed

    hook = subject.pipe.transformer.register_forward_pre_hook(stop)
    with pytest.raises(Killed):
        subject.measure(folder / "work", images=5)
    hook.remove()
    found = subject.measure(folder / "work", images=5)
    assert figures(found) == figures(Subject().measure(folder / "whole", images=5))


@pytest.mark.parametrize("after", [1, 2, 6, 11, 17])
def test_killed_while_it_writes(after, tmp_path, monkeypatch):
    """A file that is half written is under another name, and the rest of its batch is made again."""
    subject, written = Subject(), []
    replace = Path.replace

    def stop(self, target):
        written.append(target)
        if len(written) == after:
            raise Killed
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(Killed):
        subject.measure(tmp_path / "work", images=3)
    monkeypatch.undo()
    assert not written[-1].exists()
    found = subject.measure(tmp_path / "work", images=3)
    assert figures(found) == figures(Subject().measure(tmp_path / "whole", images=3))


def test_killed_while_it_measures(tmp_path, monkeypatch):
    subject, done = Subject(), []

    def stops(a, b):
        done.append(1)
        if len(done) == 4:
            raise Killed
        return distance(a, b)

    networks = Networks(lpips=stops)
    with pytest.raises(Killed):
        subject.measure(tmp_path / "work", networks=networks)
    made = subject.calls
    found = subject.measure(tmp_path / "work", networks=networks)
    assert subject.calls == made
    assert len(done) == 4 + 1 + (2 * 4 - 2)  # tried once a call, then what the first call had not kept
    whole = subject.measure(tmp_path / "whole", networks=Networks(lpips=distance))
    assert figures(found) == figures(whole)


def test_more_images_another_plan_and_another_network_make_what_is_new_alone(tmp_path):
    subject = Subject()
    first = subject.measure(tmp_path / "work", images=4, plans={"one": subject.plans["one"]}, networks=Networks())
    assert subject.batches == 2 + 2 * 2  # untimed, raw and one; then two of each
    subject.measure(tmp_path / "work", images=6, plans={"one": subject.plans["one"]}, networks=Networks())
    assert subject.batches == 6 + 2 + 2
    found = subject.measure(tmp_path / "work", images=6)
    assert subject.batches == 10 + 2 + 3
    assert figures(found) == figures(Subject().measure(tmp_path / "whole", images=6))
    assert first.images == 4
    assert found.rows[1].cost.time_ratio is None
    assert "another run" in found.not_measured["time of two"]
    again = subject.measure(tmp_path / "work", images=6)
    assert subject.batches == 15
    assert figures(again) == figures(found)


def test_a_plan_that_changed_under_its_name_is_another(tmp_path):
    subject = Subject()
    subject.measure(tmp_path / "work", images=4, plans={"plan": subject.plans["one"]})
    found = subject.measure(tmp_path / "work", images=4, plans={"plan": subject.plans["two"]})
    whole = subject.measure(tmp_path / "whole", images=4, plans={"plan": subject.plans["two"]})
    assert figures(found) == figures(whole)


def test_broken_pictures_and_arrays_are_named_and_made_anew(tmp_path):
    subject = Subject()
    whole = subject.measure(tmp_path / "work", images=4)
    kept = SettingFolder.of(tmp_path / "work", "one", subject.plans["one"])
    picture, values = kept.folder / "images/000002.png", next(kept.folder.rglob("values/psnr/000002-*.npy"))
    picture.write_bytes(picture.read_bytes()[:60])
    values.write_bytes(values.read_bytes()[:-3])
    with pytest.raises(ah.errors.InputsInvalid, match=r"cannot read .*psnr/000002-000004.npy.*delete it, and run again"):
        subject.measure(tmp_path / "work", images=4)
    values.unlink()
    with pytest.raises(ah.errors.InputsInvalid, match=r"000002.png.*delete .*000002-000004.json, and run again"):
        subject.measure(tmp_path / "work", images=4)
    kept.record_path(range(2, 4)).unlink()
    assert figures(subject.measure(tmp_path / "work", images=4)) == figures(whole)


def test_no_plan_measures_the_untouched_pipeline(tmp_path):
    found = Subject().measure(tmp_path, plans={})
    assert found.rows == ()
    assert set(found.raw.estimates) == {"is", "accuracy"}


def test_real_images_of_many_sizes_and_statistics_of_the_same(tmp_path):
    subject, sizes, pixels = Subject(), [(9, 14), (20, 11), (16, 16), (9, 14)], []
    (tmp_path / "real").mkdir()
    for i, (height, width) in enumerate(sizes):
        pixels.append(np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8))
        Image.fromarray(pixels[-1]).save(tmp_path / f"real/{i}.png")
    resized = [(tf1(torch.from_numpy(p).permute(2, 0, 1)[None].float(), 299) - 128) / 128 for p in pixels]
    features = torch.cat([Features()(image)[0] for image in resized]).double().numpy()
    np.savez(tmp_path / "statistics.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    by_folder = subject.measure(tmp_path / "work", real=tmp_path / "real")
    by_statistics = subject.measure(tmp_path / "work", real=tmp_path / "statistics.npz")
    for one, other in zip((by_folder.raw, *by_folder.rows), (by_statistics.raw, *by_statistics.rows), strict=True):
        assert one.estimates["fid"].value == pytest.approx(other.estimates["fid"].value, rel=1e-4)
        assert "kid" not in other.estimates
    assert "no features" in by_statistics.not_measured["KID"]


def test_prompts_reach_rewards_image_by_image(tmp_path):
    pipe = tiny_mmdit(torch.float32).pipe
    inputs = {"prompt": ["red fish", "small green cloud"], "num_inference_steps": 2, "negative_prompt": "house"}
    plan = ah.search(pipe, inputs, threshold=0.3, progress=False)
    networks = Networks(rewards={"hpsv2": brightness})
    found = measure(pipe, {"p": plan}, inputs, images=5, work=tmp_path, batch=3, networks=networks, progress=False)
    pictures = [np.array(Image.open(path)) for path in sorted((tmp_path / "raw/images").iterdir())]
    expected = np.mean([p.mean() / 255 + len(inputs["prompt"][i % 2]) for i, p in enumerate(pictures)])
    assert found.raw.estimates["hpsv2"].value == pytest.approx(expected, rel=1e-5)
    theirs = [np.array(Image.open(path)) for path in sorted(next(tmp_path.glob("p-*")).glob("images/*"))]
    difference = np.mean([(p / 255.0 - r / 255.0).mean() for p, r in zip(theirs, pictures, strict=True)])
    low, high = found.rows[0].estimates["hpsv2"].change
    assert low < difference < high
    assert {"CLIP score", "ImageReward"} <= set(found.not_measured)
    assert "hf download" in found.not_measured["CLIP score"]


def test_videos_frame_by_frame(tmp_path):
    bench = wan22()
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    bench.pipe.register_modules(vae=vae.double().eval())
    inputs = {name: value for name, value in bench.inputs(steps=3).items() if name not in ("generator", "output_type")}
    plan = ah.search(bench.pipe, inputs, threshold=0.5, progress=False)
    found = measure(bench.pipe, {"p": plan}, inputs, images=2, work=tmp_path, batch=1, progress=False)
    generators = [torch.Generator().manual_seed(i) for i in (0, 1)]
    videos = torch.cat([bench.pipe(**inputs, generator=g, output_type="pt").frames for g in generators])
    kept = SettingFolder.of(tmp_path, "raw", None)
    pixels = torch.cat([kept.pixels(range(i, i + 1)) for i in (0, 1)])
    torch.testing.assert_close(pixels, (videos.flatten(0, 1).float() * 255).round().byte(), atol=0, rtol=0)
    assert found.setting["frames"] == videos.shape[1] > 1
    assert found.rows[0].estimates["psnr"].value < 100


def test_too_few_images_are_warned_of_before_many_are_made(tmp_path, real):
    subject = Subject()

    def stop(*_):
        if subject.batches == 2:  # untimed: untouched, and with the first plan
            raise Killed

    subject.pipe.transformer.register_forward_pre_hook(stop)
    with pytest.warns(TooFewSamples, match=r"got 7 generated, 9 real images, wanted more than 12"), pytest.raises(Killed):
        subject.measure(tmp_path / "a", real=real)
    with pytest.warns(InputsRepeated, match=r"3 inputs for 7 images: the first 1 are generated once more.*such as 6"):
        Subject().measure(tmp_path / "b", networks=Networks())
