"""The training loop of the bundled models: Muon and AdamW, a warmed-up, held and lowered rate, EMA, exact resumption."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Config:
    """The fields of a configuration file; `model` holds what the model is built from."""

    model: dict[str, Any]
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    cooldown_steps: int
    weight_decay: float
    label_dropout: float
    ema_decay: float
    threads: int
    checkpoint_every: int
    seed: int

    def __post_init__(self) -> None:
        if (self.steps - self.cooldown_steps) % self.checkpoint_every:
            raise ValueError(
                f"the plateau ends at step {self.steps - self.cooldown_steps}, wanted a multiple of checkpoint_every "
                f"({self.checkpoint_every}), so that training can go on from there"
            )

    @classmethod
    def read(cls, path: Path) -> "Config":
        """The configuration that a JSON file holds."""
        return cls(**json.loads(path.read_text()))


def rate_factor(step: int, config: Config) -> float:
    """Warm-up, plateau, linear cooldown to zero."""
    return min(1.0, (step + 1) / config.warmup_steps, (config.steps - step) / max(1, config.cooldown_steps))


def flow(clean: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Flow matching: noisy images (1 − σ)·x + σ·e, σ (B,), and targets e − x, for clean x (B, 3, H, W); σ is logit-normal."""
    sigma = torch.sigmoid(torch.randn(len(clean), generator=rng))
    noise = torch.randn(clean.shape, generator=rng)
    s = sigma[:, None, None, None]
    return (1 - s) * clean + s * noise, sigma, noise - clean


def pick(count: int, step: int, config: Config) -> Tensor:
    """Which of `count` samples make the batch of a step; each epoch is a new order."""
    per_epoch = count // config.batch_size
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed + step // per_epoch))
    return order[(step % per_epoch) * config.batch_size :][: config.batch_size]


def randomness(step: int, config: Config) -> torch.Generator:
    """The step alone decides what is drawn in it, so that resuming is exact."""
    return torch.Generator().manual_seed(config.seed * 1_000_003 + step)


def _optimizers(model: nn.Module, hidden: list[nn.Parameter], config: Config) -> list[torch.optim.Optimizer]:
    chosen = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in chosen and p.requires_grad]
    rate, decay = config.learning_rate, config.weight_decay
    return [
        torch.optim.Muon(hidden, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=decay, betas=(0.9, 0.99)),
    ]


def _write_rows(path: Path, mode: str, rows: list[list[str]]) -> None:
    with path.open(mode, newline="") as f:
        csv.writer(f).writerows(rows)


def train(
    config: Config, model: nn.Module, hidden: list[nn.Parameter], loss_of: Callable[[int], Tensor], out: Path, device: str
) -> None:
    """Minimise `loss_of(step)` over the model's weights, the `hidden` matrices by Muon; resumes from `out` where it stopped.

    Raises:
        RuntimeError: the loss is not finite.
    """
    torch.set_num_threads(config.threads)
    opts = _optimizers(model, hidden, config)
    ema = EMAModel(model.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    out.mkdir(parents=True, exist_ok=True)
    start, state = 0, out / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True, map_location=device)
        start = saved["step"]
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        for opt, s in zip(opts, saved["optimizers"], strict=True):
            opt.load_state_dict(s)
    curve = out / "loss.csv"
    rows = list(csv.reader(curve.open())) if curve.exists() else []
    _write_rows(curve, "w", [row for row in rows if int(row[0]) <= start])  # what was lost since the checkpoint comes again

    def checkpoint(step: int) -> None:
        content = {"step": step, "model": model.state_dict(), "ema": ema.state_dict()}
        torch.save(content | {"optimizers": [o.state_dict() for o in opts]}, state.with_suffix(".tmp"))
        state.with_suffix(".tmp").rename(state)
        if step == config.steps - config.cooldown_steps:  # a longer run goes on from here, not from the cooled-down weights
            (out / "plateau.pt").write_bytes(state.read_bytes())

    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, desc="train", mininterval=10)
    losses: list[float] = []
    for step in bar:
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = config.learning_rate * rate_factor(step, config)
        loss = loss_of(step)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        ema.step(model.parameters())
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise RuntimeError(f"loss became {losses[-1]} at step {step}; resume with a lower learning_rate")
        if (step + 1) % 50 == 0:
            mean = sum(losses[-50:]) / len(losses[-50:])
            bar.set_postfix(loss=f"{mean:.4f}")
            _write_rows(curve, "a", [[str(step + 1), f"{mean:.5f}"]])
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            checkpoint(step + 1)


def averaged(model: nn.Module, state: Path) -> int:
    """Put a checkpoint's EMA weights into the model; gives its step."""
    saved = torch.load(state, weights_only=True)
    ema = EMAModel(model.parameters())
    ema.load_state_dict(saved["ema"])
    ema.copy_to(model.parameters())
    return int(saved["step"])
