"""Adapters of transformers from their authors' own sources: FLUX, SD3, Wan, DiT and PixArt-Σ.

Each is for the modules and functions that the source had when the adapter was written. They are tested on stand-ins with the
same names and calls, not with the authors' weights. `describe` makes an adapter for any other source.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from arrowhead.errors import InputsInvalid
from arrowhead.models.custom import Adapter
from arrowhead.models.custom_attention import Attention, AttentionIn, FusedQKV
from arrowhead.models.custom_blocks import Block
from arrowhead.plans.layout import BranchOrder, Grid, Tokens


def flux(*, guidance_scale: float = 1.0, cfg: BranchOrder | None = None) -> Adapter:
    r"""Returns the adapter of `flux.model.Flux`, from Black Forest Labs' source, with the attention of both kinds of blocks.

    The blocks call `attention(q, k, v, pe=pe)`. The model is called with `img` (B, N, C), patches in a row, and `txt`
    (B, T, C). The model is distilled, so the loop has no guidance.

    Args:
        guidance_scale: that of a loop with guidance of its own, for the predicted errors of budgets.
        cfg: how such a loop brings its branches, see `Adapter`.

    Raises:
        InputsInvalid: an argument is none of these.

    With `flux.sampling.denoise`, whose arguments `prepare` gives:

        adapter = arrowhead.adapters.flux()
        plan = arrowhead.search(model, lambda: denoise(model, **inputs), adapter=adapter, threshold=0.1)
        with arrowhead.applied(model, plan, adapter):
            latents = denoise(model, **inputs)
    """
    return Adapter(
        functions=[AttentionIn(r"(double|single)_blocks\.\d+", function="attention", joint=True)],
        blocks={
            r"double_blocks\.\d+": Block(
                inputs=("img", "txt"), joint=True, text=r"txt_(attn|mlp)\..*", per_sample=r"(img|txt)_mod\..*"
            ),
            r"single_blocks\.\d+": Block(inputs="x", joint=True, per_sample=r"modulation\..*"),
        },
        tokens=lambda _, call: Tokens(call["img"].shape[1], call["txt"].shape[1], text_first=True),
        cfg=cfg,
        feed_forward=r"double_blocks\.\d+\.img_mlp",
        guidance_scale=guidance_scale,
    )


def sd3(*, guidance_scale: float = 5.0) -> Adapter:
    r"""Returns the adapter of `mmdit.MMDiT`, from Stability AI's sd3-ref, with the attention of the joint blocks.

    The blocks call `attention(q, k, v, heads)` by `block_mixing`. The model is called with latents `x` (B, C, H, W) and
    `context` (B, T, C), conditional rows first. Blocks that attend twice, as some of SD3.5 medium do, are refused as they run.

    Raises:
        InputsInvalid: the scale is not a finite number.

        adapter = arrowhead.adapters.sd3(guidance_scale=4.5)
        plan = arrowhead.search(base.diffusion_model, sample, adapter=adapter, threshold=0.1)
    """
    return Adapter(
        functions=[
            AttentionIn(r"joint_blocks\.\d+", function="attention", heads="x_block.attn.num_heads", joint=True),
        ],
        blocks={
            r"joint_blocks\.\d+": Block(
                inputs=(0, 1),  # the context, and the image
                joint=_returns_its_context,
                text=r"context_block\.(attn|mlp)\..*",
                per_sample=r".*adaLN_modulation\..*",
            )
        },
        tokens=_image_and_text,
        cfg="cond_first",
        feed_forward=r"joint_blocks\.\d+\.x_block\.mlp",
        guidance_scale=guidance_scale,
    )


def wan(*, guidance_scale: float = 5.0, image_to_video: bool = False) -> Adapter:
    r"""Returns the adapter of `wan.modules.model.WanModel`: self-attention, which calls `flash_attention`, and feed-forwards.

    The model is called twice a step, with videos `x` in a list, the conditional call first. In models from text alone
    cross-attention and blocks are described, too.

    Args:
        guidance_scale: that of the sampling loop, for the predicted errors of budgets.
        image_to_video: whether the model attends to an image besides the text.

    Raises:
        InputsInvalid: the scale is not a finite number.

        adapter = arrowhead.adapters.wan(guidance_scale=5.0)
        plan = arrowhead.search(wan_t2v.model, generate, adapter=adapter, threshold=0.1)
    """
    return Adapter(
        {r"blocks\.\d+\.self_attn": Attention(function="flash_attention", layout="BNHD")},
        tokens=_videos_in_a_list if image_to_video else _videos_and_text,
        cfg="two_calls",
        feed_forward=r"blocks\.\d+\.ffn",
        cross_attention={} if image_to_video else {r"blocks\.\d+\.cross_attn": "[kv]"},
        blocks={} if image_to_video else {r"blocks\.\d+": Block(inputs="x")},
        guidance_scale=guidance_scale,
    )


def dit(*, guidance_scale: float = 4.0) -> Adapter:
    r"""Returns the adapter of `models.DiT`, from Meta's source: its attention, which is timm's, and feed-forwards.

    The model is called with latents `x` (B, 4, H, W), conditional rows first, as `forward_with_cfg` does.

    Raises:
        InputsInvalid: the scale is not a finite number.

        adapter = arrowhead.adapters.dit(guidance_scale=4.0)
        plan = arrowhead.search(model, sample, adapter=adapter, threshold=0.1)
    """
    return Adapter(
        {r"blocks\.\d+\.attn": FusedQKV(q_norm="q_norm", k_norm="k_norm")},
        tokens=_image,
        cfg="cond_first",
        feed_forward=r"blocks\.\d+\.mlp",
        blocks={r"blocks\.\d+": Block(inputs="x", per_sample=r"adaLN_modulation\..*")},
        guidance_scale=guidance_scale,
        latent_channels=4,
    )


def pixart_sigma(*, guidance_scale: float = 4.5, cfg: BranchOrder | None = "uncond_first") -> Adapter:
    r"""Returns the adapter of PixArt-Σ's `PixArt` and `PixArtMS`: self-attention by xformers' function, and feed-forwards.

    The model is called with latents `x` (B, 4, H, W). Modules that compress keys and values are refused. Cross-attention and
    blocks are computed in every step: they take the texts of all samples in one row, so that no branch can run alone.

    Args:
        guidance_scale: that of the sampler, for the predicted errors of budgets.
        cfg: the order of the branches: that of DPM-Solver by default; "cond_first" for IDDPM and `forward_with_cfg`.

    Raises:
        InputsInvalid: an argument is none of these.

        adapter = arrowhead.adapters.pixart_sigma(guidance_scale=4.5)
        plan = arrowhead.search(model, sample, adapter=adapter, threshold=0.1)
    """
    return Adapter(
        {r"blocks\.\d+\.attn": Attention(function="memory_efficient_attention", layout="BNHD")},
        tokens=_image_of_pixart,
        cfg=cfg,
        feed_forward=r"blocks\.\d+\.mlp",
        guidance_scale=guidance_scale,
        latent_channels=4,
    )


def _returns_its_context(block: Any) -> bool:
    """Whether it is not the last one, which gives the image alone."""
    return not block.context_block.pre_only


def _image(model: Any, call: Mapping[str, Any], text: int = 0) -> Tokens:
    """An image (B, C, H, W) in square patches; text comes first."""
    rows, columns = (size // model.patch_size for size in call["x"].shape[2:])
    return Tokens.of_grid(1, rows, columns, text=text, text_first=text > 0)


def _image_and_text(model: Any, call: Mapping[str, Any]) -> Tokens:
    return _image(model, call, call["context"].shape[1] + getattr(model, "register_length", 0))


def _image_of_pixart(model: Any, call: Mapping[str, Any]) -> Tokens:
    if compressed := [i for i, block in enumerate(model.blocks) if getattr(block.attn, "sr_ratio", 1) > 1]:
        raise InputsInvalid(
            f"got blocks {compressed} whose keys and values are compressed, wanted as many keys as queries; name the other "
            "blocks in an adapter of your own"
        )
    return _image(model, call)


def _videos_in_a_list(model: Any, call: Mapping[str, Any]) -> Tokens:
    """Videos (C, F, H, W) in patches, padded to `seq_len` tokens: on a grid where nothing is padded."""
    grid = Grid(*(size // patch for size, patch in zip(call["x"][0].shape[1:], model.patch_size, strict=True)))
    return Tokens(call["seq_len"], grid=grid if grid.size == call["seq_len"] else None)


def _videos_and_text(model: Any, call: Mapping[str, Any]) -> Tokens:
    """The same with the text, which the model pads to one length."""
    if getattr(model.blocks[0].cross_attn, "k_img", None) is not None:
        raise InputsInvalid("got a model that attends to an image, wanted one from text alone; say wan(image_to_video=True)")
    return replace(_videos_in_a_list(model, call), text=model.text_len)
