"""Figures by which pictures are judged, each against a computation of its own kind: scipy, torchmetrics, or loops."""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from arrowhead.errors import InputsInvalid
from arrowhead.evaluation import measures
from arrowhead.evaluation.estimates import Reference, distribution_estimates, frechet_distance, image_estimates, inception_score
from arrowhead.evaluation.measures import Batch, Measure
from arrowhead.evaluation.peak_memory import PeakMemory
from arrowhead.evaluation.real_images import read_real_images
from arrowhead.metrics.bootstrap import bootstrap, interval, resampled_means
from arrowhead.metrics.distributions import frechet, kernel_distances, moments, moments_without_each
from arrowhead.metrics.images import decibels, psnr, squared_errors, ssim, ssim_each
from arrowhead.metrics.resize import MODES, tf1

TOOLS = Path(__file__).parent.parent.parent / "shared/tools"
INCEPTION = os.environ.get("ARROWHEAD_INCEPTION")
needs_tools = pytest.mark.skipif(
    not TOOLS.is_dir(), reason="LPIPS and its weights are not part of the project: ../shared/tools"
)
needs_inception = pytest.mark.skipif(
    not (INCEPTION and TOOLS.is_dir()),
    reason="the FID network is not part of the project: set ARROWHEAD_INCEPTION to what ../shared/tools/fid_inception.py makes",
)


def tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def correlated(count, size, shift=0.0):
    return torch.randn(count, size) @ torch.randn(size, size) + shift


class Same(torch.nn.Module):
    """For torchmetrics, a network whose features are its input."""

    num_features = 12

    def forward(self, x):
        return x


@pytest.mark.parametrize(("made", "theirs"), [(40, 60), (300, 200), (7, 9)])  # the last has covariances of low rank
def test_fid_agrees_with_scipy_s_square_root_and_with_torchmetrics(made, theirs):
    a, b = correlated(made, 12), correlated(theirs, 12, shift=0.5)
    mine = frechet(moments(a), moments(b))
    x, y = a.double().numpy(), b.double().numpy()
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    cross = np.trace(sqrtm(cov_x @ cov_y).real)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * cross
    assert mine == pytest.approx(expected, rel=1e-5)

    fid = FrechetInceptionDistance(feature=Same(), input_img_size=(12,)).set_dtype(torch.float64)
    fid.update(b.double(), real=True)
    fid.update(a.double(), real=False)
    assert mine == pytest.approx(fid.compute().item(), rel=1e-5)
    assert frechet(moments(a), moments(a)) == pytest.approx(0, abs=1e-6 * np.trace(cov_x))


def test_moments_of_many_parts_are_those_of_all(monkeypatch):
    monkeypatch.setattr("arrowhead.metrics.distributions.AT_ONCE", 7)
    features = correlated(50, 5, shift=100)
    found = moments(features)
    assert found.count == 50
    np.testing.assert_allclose(found.mean, features.double().numpy().mean(0))
    np.testing.assert_allclose(found.covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("splits", [1, 3])
def test_the_inception_score_agrees_with_torchmetrics(splits, monkeypatch):
    logits = 2 * torch.randn(60, 12)
    monkeypatch.setattr("arrowhead.evaluation.estimates.SPLIT", 60 // splits)
    monkeypatch.setattr("torchmetrics.image.inception.torch.randperm", torch.arange)  # it shuffles first
    theirs = InceptionScore(feature=Same(), splits=splits)
    theirs.update(logits)
    mine = inception_score(logits)
    assert mine.value == pytest.approx(theirs.compute()[0].item(), rel=1e-5)
    assert mine.interval[0] < mine.value + 0.5
    assert mine.interval[0] < mine.interval[1]


def test_kernel_distances_agree_with_sums_over_pairs():
    made, theirs, size = correlated(9, 4).double(), correlated(11, 4, 1.0).double(), 6
    found = kernel_distances(made, theirs, subsets=3, size=size, seed=5)
    generator = torch.Generator().manual_seed(5)
    for distance in found:
        a = made[torch.randperm(9, generator=generator)[:size]].tolist()
        b = theirs[torch.randperm(11, generator=generator)[:size]].tolist()
        kernel = lambda x, y: (sum(p * q for p, q in zip(x, y, strict=True)) / 4 + 1) ** 3  # noqa: E731
        within = sum(kernel(s[i], s[j]) for s in (a, b) for i in range(size) for j in range(size) if i != j)
        across = sum(kernel(x, y) for x in a for y in b)
        assert distance.item() == pytest.approx(within / (size * (size - 1)) - 2 * across / size**2, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 23))
def test_tensorflow_1_s_resize_pixel_by_pixel(height, width, size):
    image = torch.rand(2, 1, height, width, dtype=torch.float64)
    found = tf1(image, size)
    for y in range(size):
        for x in range(size):
            at_y, at_x = y * height / size, x * width / size
            y0, x0 = min(int(at_y + 1e-12), height - 1), min(int(at_x + 1e-12), width - 1)
            fy, fx = at_y - y0, at_x - x0
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            expected = (image[..., y0, x0] * (1 - fx) + image[..., y0, x1] * fx) * (1 - fy)
            expected += (image[..., y1, x0] * (1 - fx) + image[..., y1, x1] * fx) * fy
            torch.testing.assert_close(found[..., y, x], expected)


@pytest.mark.parametrize("mode", MODES)
def test_every_way_to_resize_keeps_what_is_even(mode):
    even = torch.full((1, 3, 5, 9), 200.0)
    torch.testing.assert_close(MODES[mode](even, 12), torch.full((1, 3, 12, 12), 200.0))


def test_the_bootstrap_is_that_of_rows_drawn_again():
    values = torch.randn(17, 3)
    drawn = torch.randint(17, (40, 17), generator=torch.Generator().manual_seed(3))
    expected = torch.stack([values.double()[rows].mean(0) for rows in drawn])
    torch.testing.assert_close(resampled_means(values, 40, seed=3), expected)


def test_an_interval_is_about_as_wide_as_the_normal_distribution_s():
    values = torch.randn(400, 1)
    low, high = bootstrap(values)
    error = values.std().item() / 20
    assert low == pytest.approx(values.mean().item() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(values.mean().item() + 1.96 * error, abs=0.25 * error)
    assert interval(torch.arange(101.0), 0.9) == (5, 95)
    assert bootstrap(torch.zeros(5, 1), lambda means: decibels(means[..., 0])) == (float("inf"), float("inf"))


def test_images_one_by_one_are_those_of_all():
    raw = torch.rand(5, 3, 24, 24)
    images = (raw + 0.1 * torch.randn(raw.shape)).clamp(0, 1)
    assert decibels(squared_errors(images, raw).mean()).item() == pytest.approx(psnr(images, raw))
    assert ssim_each(images, raw).mean().item() == pytest.approx(ssim(images, raw), rel=1e-5)
    single = [ssim(images[i : i + 1], raw[i : i + 1]) for i in range(5)]
    assert ssim_each(images, raw).tolist() == pytest.approx(single, rel=1e-4)
    assert ssim_each(images[:1], raw[:1]).shape == (1,)


def test_a_difference_is_drawn_in_pairs():
    """A value that is larger by 1 for every image has an interval of no width, however much the images differ."""
    raw = torch.randn(30, 1)
    found = image_estimates(Measure("reward", "reward", None), raw + 1, raw, 1)["reward"]
    assert found.change == pytest.approx((1, 1), abs=1e-6)
    assert found.interval[1] - found.interval[0] > 0.2


def test_a_video_s_frames_are_one_sample():
    frames = torch.randn(6, 1).repeat_interleave(50, 0)
    found = image_estimates(Measure("reward", "reward", None), frames, None, 50)["reward"]
    alone = image_estimates(Measure("reward", "reward", None), frames[::50], None, 1)["reward"]
    assert found.value == pytest.approx(alone.value)
    assert found.interval == pytest.approx(alone.interval)


def test_moments_without_each_group_are_those_of_the_rest():
    features, groups = correlated(23, 4, shift=10), torch.arange(23) % 3
    for group, found in enumerate(moments_without_each(features, groups)):
        rest = features[groups != group].double().numpy()
        assert found.count == len(rest)
        np.testing.assert_allclose(found.mean, rest.mean(0))
        np.testing.assert_allclose(found.covariance, np.cov(rest, rowvar=False), rtol=1e-7, atol=1e-8)


def test_intervals_of_fid_and_of_its_change_are_as_wide_as_fids_of_other_draws_vary():
    """Two settings whose images differ by little: the change is known far better than either."""
    real, measured, changed, wide, narrow = Reference.of(torch.randn(3000, 3)), [], [], [], []
    for _ in range(60):
        raw = torch.randn(400, 3) + 0.5
        untouched = frechet_distance(raw, real, None, 1)
        found = frechet_distance(raw * 1.05 + 0.02 * torch.randn_like(raw), real, untouched, 1)
        measured.append(found.value)
        changed.append(found.value - untouched.value)
        wide.append((found.interval[1] - found.interval[0]) ** 2)
        narrow.append((found.change[1] - found.change[0]) ** 2)
        assert sum(found.change) / 2 == pytest.approx(changed[-1])
    for values, widths in ((measured, wide), (changed, narrow)):
        assert np.mean(widths) ** 0.5 / (2 * 1.96) == pytest.approx(np.std(values), rel=0.4)
    assert np.mean(narrow) < np.mean(wide) / 4
    assert frechet_distance(torch.randn(19, 3), real, None, 1).interval is None
    assert frechet_distance(torch.randn(40, 3), real, None, 4).interval is None


def test_features_and_logits_lie_side_by_side():
    features, logits, theirs = correlated(30, 6), torch.randn(30, 4), correlated(25, 6)
    measure = Measure("inception", "inception", None, features=6, logits=4)
    found = distribution_estimates(measure, torch.cat([features, logits], 1), Reference.of(theirs), None, 1)
    assert found["fid"].value == pytest.approx(frechet(moments(features), moments(theirs)))
    assert found["is"].value == pytest.approx(inception_score(logits).value)
    assert found["kid"].value == pytest.approx(kernel_distances(features, theirs, 100, 12).mean().item())
    assert set(distribution_estimates(measure, torch.cat([features, logits], 1), None, None, 1)) == {"is"}
    statistics = Reference.of(moments(theirs))
    assert set(distribution_estimates(measure, torch.cat([features, logits], 1), statistics, None, 1)) == {"fid", "is"}


@needs_tools
def test_lpips_is_the_tool_s():
    network = tool("perceptual").LPIPS()
    a, b = torch.randint(256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    found = measures.lpips(f"{TOOLS / 'perceptual.py'}:LPIPS").values(Batch(a, b))
    expected = network(a / 127.5 - 1, b / 127.5 - 1)
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-4, atol=1e-6)


@needs_tools
def test_accuracy_is_how_often_the_classifier_agrees():
    pixels = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    says = tool("perceptual").CifarResNet56()(pixels / 255)[0].argmax(-1).tolist()
    labels = [said if i % 2 else (said + 1) % 10 for i, said in enumerate(says)]
    measure = measures.accuracy(f"{TOOLS / 'perceptual.py'}:CifarResNet56")
    assert measure.values(Batch(pixels, labels=labels))[:, 0].tolist() == [0, 1] * 3
    with pytest.raises(InputsInvalid, match=r"wanted logits of labels up to 10"):
        measure.values(Batch(pixels, labels=[10] * 6))


@needs_inception
def test_features_of_the_fid_network_are_the_tool_s():
    fid = tool("fid_inception")
    pixels = torch.randint(256, (3, 3, 32, 40), dtype=torch.uint8)
    measure = measures.inception(INCEPTION)
    expected = fid.features(fid.load(INCEPTION), pixels.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(measure.values(Batch(pixels)).numpy(), expected, rtol=1e-3, atol=1e-4)
    assert (measure.features, measure.logits) == (2048, 0)


def test_torch_fidelity_s_network_by_its_weights(tmp_path):
    fidelity = pytest.importorskip("torch_fidelity", reason="torch-fidelity is of the extra `metrics`, and needs torchvision")
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:  # random weights, since the real ones are a download
        name = "torch_fidelity.feature_extractor_inceptionv3"
        patched.setattr(f"{name}.load_state_dict_from_url", lambda *_, **__: {})
        patched.setattr(f"{name}.FeatureExtractorInceptionV3.load_state_dict", lambda *_: None)
        whole = fidelity.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    pixels = torch.randint(256, (2, 3, 24, 30), dtype=torch.uint8)
    measure = measures.inception(tmp_path / "weights.pth")
    assert (measure.features, measure.logits) == (2048, 1008)
    torch.testing.assert_close(measure.values(Batch(pixels)), torch.cat(whole(pixels), -1), rtol=1e-3, atol=1e-4)


def test_real_images_by_folder_array_and_statistics(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng().integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)
    (tmp_path / "deep/er").mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"deep/{'er/' if i else ''}{i}.png")
    np.savez(tmp_path / "images.npz", some=pixels)
    cov = np.cov(np.random.default_rng().normal(size=(4, 9)))
    np.savez(tmp_path / "stats.npz", mu=np.arange(4.0), sigma=cov)
    array = f"{tmp_path / 'images.npz'}:some"
    for found, order in (
        (read_real_images(tmp_path / "deep"), (0, 1, 2)),
        (read_real_images(array), (0, 1, 2)),
    ):
        assert [found.read(i).permute(1, 2, 0).numpy().tolist() for i in range(3)] == [pixels[i].tolist() for i in order]
    statistics = read_real_images(tmp_path / "stats.npz")
    assert statistics.mean.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(statistics.covariance, cov)


def test_a_module_that_a_name_points_to_does_not_stay_in_the_way(tmp_path):
    (tmp_path / "mine.py").write_text("def score(images, prompts):\n    return [len(p) for p in prompts]\n")
    measure = measures.reward("mine", f"{tmp_path / 'mine.py'}:score")
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert measure.values(Batch(pixels, captions=["a", "abc"])).tolist() == [[1], [3]]
    assert "mine" not in sys.modules


def test_the_peak_of_a_block_is_its_own():
    before = PeakMemory(torch.device("cpu"))
    if before.bytes() is None:
        pytest.skip("this system does not tell what a process had resident")
    first, size = before.bytes(), 2**27
    torch.ones(size, dtype=torch.uint8)
    assert before.bytes() >= first + 0.9 * size
    assert PeakMemory(torch.device("cpu")).bytes() < first + 0.5 * size
