"""Train the bundled class-conditional DiT on CIFAR-10, in pixel space.

    python training/dit.py --data data/cifar10.npz          # resumes from checkpoints/dit where it stopped

The data file holds ``x_train`` (50000, 32, 32, 3) and ``y_train`` (50000,), both uint8. Everything else is in ``dit.json``.
Objective: flow matching. With noise e and logit-normal σ, the input is (1 − σ)·x + σ·e, the target e − x, the time ⌊1000·σ⌋.
Hidden matrices are trained by Muon, everything else by AdamW; the rate is warmed up, held, and at the end lowered to zero.
"""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Config:
    """The fields of ``dit.json``."""

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


def build(config: Config) -> DiTTransformer2DModel:
    """A model whose blocks start as the identity: modulation and output projection are zero (adaLN-Zero)."""
    torch.manual_seed(config.seed)
    model = DiTTransformer2DModel(**config.model)
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    torch.nn.init.zeros_(model.proj_out_2.weight)
    torch.nn.init.zeros_(model.proj_out_2.bias)
    return model.eval()  # in training mode diffusers would drop the labels of every block on its own


def optimizers(model: DiTTransformer2DModel, config: Config) -> list[torch.optim.Optimizer]:
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and (".attn1." in n or ".ff." in n)]
    chosen = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in chosen and p.requires_grad]
    rate, decay = config.learning_rate, config.weight_decay
    return [
        torch.optim.Muon(hidden, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=decay, betas=(0.9, 0.99)),
    ]


def rate_factor(step: int, config: Config) -> float:
    """Warm-up, plateau, linear cooldown to zero."""
    return min(1.0, (step + 1) / config.warmup_steps, (config.steps - step) / max(1, config.cooldown_steps))


def batch(x: Tensor, y: Tensor, step: int, config: Config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy images, timesteps, labels and targets of one step; the step alone decides the randomness, so resuming is exact."""
    rng = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    per_epoch = len(x) // config.batch_size
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(config.seed + step // per_epoch))
    index = order[(step % per_epoch) * config.batch_size :][: config.batch_size]
    clean = x[index].float().permute(0, 3, 1, 2) / 127.5 - 1  # (B, 3, 32, 32) in [-1, 1]
    flip = torch.rand(len(index), generator=rng) < 0.5
    clean = torch.where(flip[:, None, None, None], clean.flip(-1), clean)
    dropped = torch.rand(len(index), generator=rng) < config.label_dropout
    labels = torch.where(dropped, config.model["num_embeds_ada_norm"], y[index].long())
    sigma = torch.sigmoid(torch.randn(len(index), generator=rng))
    noise = torch.randn(clean.shape, generator=rng)
    s = sigma[:, None, None, None]
    return (1 - s) * clean + s * noise, (sigma * 1000).long(), labels, noise - clean


def write_rows(path: Path, mode: str, rows: list[list[str]]) -> None:
    with path.open(mode, newline="") as f:
        csv.writer(f).writerows(rows)


def train(config: Config, data: Path, out: Path, init: Path | None, device: str) -> None:
    torch.set_num_threads(config.threads)
    arrays = np.load(data)
    x, y = torch.from_numpy(arrays["x_train"]), torch.from_numpy(arrays["y_train"])
    model = build(config).to(device)
    if init is not None:
        model.load_state_dict(DiTTransformer2DModel.from_pretrained(init, subfolder="transformer").state_dict())
    opts = optimizers(model, config)
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
    write_rows(curve, "w", [row for row in rows if int(row[0]) <= start])  # what was lost since the checkpoint comes again

    def checkpoint(step: int) -> None:
        content = {"step": step, "model": model.state_dict(), "ema": ema.state_dict()}
        torch.save(content | {"optimizers": [o.state_dict() for o in opts]}, state.with_suffix(".tmp"))
        state.with_suffix(".tmp").rename(state)
        plateau_end = config.steps - config.cooldown_steps
        if step == plateau_end:  # a longer run goes on from here, not from the cooled-down weights
            (out / "plateau.pt").write_bytes(state.read_bytes())

    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, desc="train", mininterval=10)
    losses: list[float] = []
    for step in bar:
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = config.learning_rate * rate_factor(step, config)
        noisy, timesteps, labels, target = (tensor.to(device) for tensor in batch(x, y, step, config))
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            predicted = model(noisy, timestep=timesteps, class_labels=labels).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), target)
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
            write_rows(curve, "a", [[str(step + 1), f"{mean:.5f}"]])
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            checkpoint(step + 1)


def main(
    data: Annotated[Path, typer.Option(help="npz with x_train and y_train")],
    config: Annotated[Path, typer.Option(help="training configuration")] = HERE / "dit.json",
    out: Annotated[Path, typer.Option(help="folder of checkpoints")] = Path("checkpoints/dit"),
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
    init: Annotated[Path | None, typer.Option(help="a bundled pipeline whose weights a new run starts from")] = None,
) -> None:
    """Train, or go on with training, the bundled DiT."""
    train(Config(**json.loads(config.read_text())), data, out, init, device)


if __name__ == "__main__":
    typer.run(main)
