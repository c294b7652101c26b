"""Train the bundled text-to-image MMDiT on emoji, in pixel space.

    python training/mmdit.py --data data/emoji64.npz      # resumes from checkpoints/mmdit where it stopped

The data file holds ``images`` (n, 64, 64, 3) uint8 with ``style``, ``name`` and ``tags`` (comma-separated) of each. Everything
else is in ``mmdit.json``. Images are trained on at the configuration's size, `patch_size` × `pos_embed_max_size`: first
32 × 32, then, with ``--init``, 64 × 64.
"""

import random
from pathlib import Path
from typing import Annotated

import loop
import torch
import typer
from captions import LENGTH, Emoji, tokenizer
from diffusers import SD3Transformer2DModel
from loop import Config
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

HERE = Path(__file__).parent


class TextToImage(nn.Module):
    """The two networks that are trained together."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        torch.manual_seed(config.seed)
        self.transformer = SD3Transformer2DModel(**config.model["transformer"])
        self.text_encoder = CLIPTextModelWithProjection(CLIPTextConfig(**config.model["text_encoder"]))
        for block in self.transformer.transformer_blocks:  # adaLN-Zero: blocks start as the identity
            for norm in (block.norm1, block.norm1_context):
                nn.init.zeros_(norm.linear.weight)
                nn.init.zeros_(norm.linear.bias)
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)

    @property
    def hidden(self) -> list[nn.Parameter]:
        """The matrices of attention and feed-forward."""
        named = self.transformer.named_parameters()
        return [p for n, p in named if p.ndim == 2 and (".attn." in n or ".ff" in n)]

    def forward(self, noisy: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        """Velocities (B, 3, H, W) for noisy images (B, 3, H, W), noise levels σ (B,) and token ids (B, LENGTH)."""
        text = self.text_encoder(ids)
        return self.transformer(noisy, text.last_hidden_state, text.text_embeds, sigma * 1000).sample


def size(config: Config) -> int:
    """Pixels on a side: the whole of the position embedding."""
    transformer = config.model["transformer"]
    return int(transformer["patch_size"] * transformer["pos_embed_max_size"])


def words(data: Emoji) -> list[str]:
    """What the vocabulary is made of: each seen picture's caption once without tags, once with all of them."""
    return [text for i in data.seen for text in (data.caption(i), ", ".join(data.tags[i]))]


def train(config: Config, path: Path, out: Path, init: Path | None, device: str) -> None:
    data = Emoji.read(path)
    seen, tokens = data.seen, tokenizer(words(data))
    side = size(config)
    pixels = torch.from_numpy(data.images[list(seen)]).permute(0, 3, 1, 2).float() / 127.5 - 1  # (n, 3, 64, 64) in [-1, 1]
    pixels = nn.functional.avg_pool2d(pixels, pixels.shape[-1] // side)
    model = TextToImage(config).to(device)
    if len(tokens) != config.model["text_encoder"]["vocab_size"]:
        raise ValueError(f"got {len(tokens)} words, wanted vocab_size to say so")
    if init is not None:
        weights = SD3Transformer2DModel.from_pretrained(init, subfolder="transformer").state_dict()
        weights["pos_embed.pos_embed"] = model.transformer.pos_embed.pos_embed  # fixed, and of another size perhaps
        model.transformer.load_state_dict(weights)
        encoder = CLIPTextModelWithProjection.from_pretrained(init, subfolder="text_encoder", dtype=torch.float32)
        model.text_encoder.load_state_dict(encoder.state_dict())

    def loss_of(step: int) -> Tensor:
        rng, index = loop.randomness(step, config), loop.pick(len(seen), step, config)
        draw = random.Random(config.seed * 1_000_003 + step)
        texts = ["" if draw.random() < config.label_dropout else data.caption(seen[i], draw) for i in index.tolist()]
        ids = tokens(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
        noisy, sigma, target = loop.flow(pixels[index], rng)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            predicted = model(noisy.to(device), sigma.to(device), ids.to(device))
        return nn.functional.mse_loss(predicted.float(), target.to(device))

    loop.train(config, model, model.hidden, loss_of, out, device)


def main(
    data: Annotated[Path, typer.Option(help="npz with images, style, name and tags")],
    config: Annotated[Path, typer.Option(help="training configuration")] = HERE / "mmdit.json",
    out: Annotated[Path, typer.Option(help="folder of checkpoints")] = Path("checkpoints/mmdit"),
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
    init: Annotated[
        Path | None, typer.Option(help="a bundled pipeline, perhaps of smaller images, that a new run starts from")
    ] = None,
) -> None:
    """Train, or go on with training, the bundled MMDiT."""
    train(Config.read(config), data, out, init, device)


if __name__ == "__main__":
    typer.run(main)
