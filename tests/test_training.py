"""The training script: stopped and resumed it ends with the weights, averages and loss curve of a run that never stopped."""

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

TRAINING = Path(__file__).parent.parent / "training"


@pytest.fixture
def dit(monkeypatch):
    monkeypatch.syspath_prepend(TRAINING)
    module = importlib.import_module("dit")
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


@pytest.fixture
def config(dit):
    model = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "num_layers": 2, "sample_size": 8}
    settings = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2, "cooldown_steps": 2}
    more = {"weight_decay": 0.01, "label_dropout": 0.3, "ema_decay": 0.9, "threads": 1, "checkpoint_every": 2, "seed": 3}
    return dit.Config(model={**model, "patch_size": 2, "num_embeds_ada_norm": 10}, **settings, **more)


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng()
    path = tmp_path / "data.npz"
    np.savez(path, x_train=rng.integers(0, 256, (10, 8, 8, 3), np.uint8), y_train=rng.integers(0, 10, 10, np.uint8))
    return path


def test_a_stopped_training_goes_on_as_if_it_had_not(dit, config, data, tmp_path, monkeypatch):
    dit.train(config, data, tmp_path / "whole", None, "cpu")
    own = dit.batch

    def stopped(x, y, step, config):
        if step == 5:
            raise KeyboardInterrupt
        return own(x, y, step, config)

    monkeypatch.setattr(dit, "batch", stopped)
    with pytest.raises(KeyboardInterrupt):
        dit.train(config, data, tmp_path / "twice", None, "cpu")
    monkeypatch.setattr(dit, "batch", own)
    assert torch.load(tmp_path / "twice/state.pt")["step"] == 4
    dit.train(config, data, tmp_path / "twice", None, "cpu")

    whole, twice = (torch.load(tmp_path / name / "state.pt") for name in ("whole", "twice"))
    assert whole["step"] == twice["step"] == 6
    for name, weight in whole["model"].items():
        assert torch.equal(weight, twice["model"][name]), name
    for mine, other in zip(whole["ema"]["shadow_params"], twice["ema"]["shadow_params"], strict=True):
        assert torch.equal(mine, other)
    fresh = dit.build(config).state_dict()
    assert any(not torch.equal(weight, fresh[name]) for name, weight in whole["model"].items())
    assert torch.load(tmp_path / "twice/plateau.pt")["step"] == 4


def test_noise_and_targets_are_those_of_flow_matching(dit, config, data):
    arrays = np.load(data)
    x, y = torch.from_numpy(arrays["x_train"]), torch.from_numpy(arrays["y_train"])
    noisy, timesteps, labels, target = dit.batch(x, y, 1, replace(config, label_dropout=0.0))
    sigma = (timesteps + 0.5) / 1000  # known to half a thousandth
    clean = noisy - sigma[:, None, None, None] * target  # x = noisy − σ·(e − x)
    pixels = x.permute(0, 3, 1, 2) / 127.5 - 1
    for image, label in zip(clean, labels, strict=True):
        distances = [min((image - p).abs().max(), (image - p.flip(-1)).abs().max()) for p in pixels]
        assert min(distances) < 0.01
        assert y[int(np.argmin(distances))] == label
    dropped = dit.batch(x, y, 1, replace(config, label_dropout=1.0))[2]
    assert (dropped == 10).all()
