"""Train the bundled class-conditional DiT on CIFAR-10, in pixel space.

    python training/dit.py --data data/cifar10.npz          # resumes from checkpoints/dit where it stopped

The data file holds ``x_train`` (50000, 32, 32, 3) and ``y_train`` (50000,), both uint8. Everything else is in ``dit.json``.
"""

from pathlib import Path
from typing import Annotated

import loop
import numpy as np
import torch
import typer
from diffusers import DiTTransformer2DModel
from loop import Config
from torch import Tensor

HERE = Path(__file__).parent


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


def batch(x: Tensor, y: Tensor, step: int, config: Config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy images, timesteps ⌊1000·σ⌋, labels and targets of one step."""
    rng, index = loop.randomness(step, config), loop.pick(len(x), step, config)
    clean = x[index].float().permute(0, 3, 1, 2) / 127.5 - 1  # (B, 3, 32, 32) in [-1, 1]
    flip = torch.rand(len(index), generator=rng) < 0.5
    clean = torch.where(flip[:, None, None, None], clean.flip(-1), clean)
    dropped = torch.rand(len(index), generator=rng) < config.label_dropout
    labels = torch.where(dropped, config.model["num_embeds_ada_norm"], y[index].long())
    noisy, sigma, target = loop.flow(clean, rng)
    return noisy, (sigma * 1000).long(), labels, target


def train(config: Config, data: Path, out: Path, init: Path | None, device: str) -> None:
    arrays = np.load(data)
    x, y = torch.from_numpy(arrays["x_train"]), torch.from_numpy(arrays["y_train"])
    model = build(config).to(device)
    if init is not None:
        model.load_state_dict(DiTTransformer2DModel.from_pretrained(init, subfolder="transformer").state_dict())

    def loss_of(step: int) -> Tensor:
        noisy, timesteps, labels, target = (tensor.to(device) for tensor in batch(x, y, step, config))
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            predicted = model(noisy, timestep=timesteps, class_labels=labels).sample
        return torch.nn.functional.mse_loss(predicted.float(), target)

    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and (".attn1." in n or ".ff." in n)]
    loop.train(config, model, hidden, loss_of, out, device)


def main(
    data: Annotated[Path, typer.Option(help="npz with x_train and y_train")],
    config: Annotated[Path, typer.Option(help="training configuration")] = HERE / "dit.json",
    out: Annotated[Path, typer.Option(help="folder of checkpoints")] = Path("checkpoints/dit"),
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
    init: Annotated[Path | None, typer.Option(help="a bundled pipeline whose weights a new run starts from")] = None,
) -> None:
    """Train, or go on with training, the bundled DiT."""
    train(Config.read(config), data, out, init, device)


if __name__ == "__main__":
    typer.run(main)
