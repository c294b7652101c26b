"""Small pipelines of the families other than DiT, PixArt, SD3 and FLUX: diffusers' classes, random weights, no text encoder."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLFlux2,
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LattePipeline,
    LatteTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from family_bench import CHANNELS, DIM, HEADS, SHARP, TEXT, FamilyBench, finished, flow, inputs_of
from image_benches import IMAGES, SECOND
from pipelines import POOLED, randomise, scheduler, vae
from video_benches import VIDEO, wan_vae

HUNYUAN_TEXTS = {
    "cross_attention_dim": CHANNELS,
    "cross_attention_dim_t5": SECOND[1],
    "text_len": TEXT,
    "text_len_t5": SECOND[0],
    "pooled_projection_dim": 12,
}


def wan_transformer(seed: int, **config: Any) -> WanTransformer3DModel:
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 2, "ffn_dim": 32, "freq_dim": 16}
    standard = {"in_channels": 4, "out_channels": 4, "text_dim": CHANNELS, "rope_max_seq_len": 32, **sizes}
    model = WanTransformer3DModel(**standard | config)
    randomise(model, seed, SHARP)
    return model


def wan(dtype: torch.dtype = torch.float64, seed: int = 0, **parts: Any) -> FamilyBench:
    """Frames × height × width beside a text; two calls."""
    pipe = WanPipeline(None, None, None, flow(), **{"transformer": wan_transformer(seed), **parts})
    inputs = inputs_of(dtype, "guidance_scale", None, height=64, width=48, num_frames=5)
    return FamilyBench(finished(pipe, dtype), True, 2 * 4 * 3, inputs, two_calls=True)


def wan22(dtype: torch.dtype = torch.float64, seed: int = 0, **parts: Any) -> FamilyBench:
    """As `wan`, with a second transformer at timesteps below 875 (from the third step of five on), at a smaller scale."""
    bench = wan(dtype, seed, **{"transformer_2": wan_transformer(seed + 1), "boundary_ratio": 0.875, **parts})
    own, bench.switch = bench.inputs, 2
    bench.inputs = lambda *args, **more: own(*args, **{"guidance_scale_2": 2.0, **more})
    return bench


def qwen(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Text before image, padding masked; two calls."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 2, "axes_dims_rope": (2, 2, 4)}
    model = QwenImageTransformer2DModel(in_channels=16, out_channels=4, joint_attention_dim=CHANNELS, **sizes)
    randomise(model, seed, SHARP)
    pipe = QwenImagePipeline(flow(), None, None, None, model)
    inputs = inputs_of(dtype, "true_cfg_scale", "{}prompt_embeds_mask", height=64, width=80)
    return FamilyBench(finished(pipe, dtype), True, 4 * 5, inputs, TEXT, text_first=True, two_calls=True)


def chroma(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """FLUX's blocks, padding masked, with modulation from outside; two calls."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 1, "num_single_layers": 1}
    guide = {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1}
    model = ChromaTransformer2DModel(in_channels=16, joint_attention_dim=CHANNELS, axes_dims_rope=(2, 2, 4), **sizes, **guide)
    randomise(model, seed, SHARP)
    pipe = ChromaPipeline(flow(), None, None, None, model)
    inputs = inputs_of(dtype, "guidance_scale", "{}prompt_attention_mask", height=64, width=80)
    return FamilyBench(finished(pipe, dtype), True, 4 * 5, inputs, TEXT, text_first=True, two_calls=True)


def hunyuan_video(dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any) -> FamilyBench:
    """Video before text, in two streams and then in one, padding masked; two calls."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 1, "num_single_layers": 1}
    text = {"text_embed_dim": CHANNELS, "pooled_projection_dim": POOLED, "num_refiner_layers": 1}
    standard = {"in_channels": 4, "out_channels": 4, "rope_axes_dim": (2, 2, 4), **sizes, **text}
    model = HunyuanVideoTransformer3DModel(**standard | config)
    randomise(model, seed, SHARP)
    pipe = HunyuanVideoPipeline(None, None, model, None, flow(), None, None)
    size = {"height": 64, "width": 48, "num_frames": 5}
    inputs = inputs_of(dtype, "true_cfg_scale", "{}prompt_attention_mask", pooled=True, **size)
    return FamilyBench(finished(pipe, dtype), True, 2 * 4 * 3, inputs, TEXT, two_calls=True)


def ltx(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Packed frames beside a text whose padding is masked; one batch, [uncond, cond], with rotary embeddings for each row."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 2, "cross_attention_dim": HEADS * DIM}
    model = LTXVideoTransformer3DModel(in_channels=4, out_channels=4, caption_channels=CHANNELS, **sizes)
    randomise(model, seed, SHARP)
    pipe = LTXPipeline(flow(), None, None, None, model)
    inputs = inputs_of(dtype, "guidance_scale", "{}prompt_attention_mask", height=128, width=96, num_frames=9)
    return FamilyBench(finished(pipe, dtype), False, 2 * 4 * 3, inputs)


def cogvideox(dtype: torch.dtype = torch.float64, seed: int = 0, in_channels: int = 4) -> FamilyBench:
    """Text before frames through the same layers; one batch, [uncond, cond]."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 2, "time_embed_dim": 8}
    shape = {"sample_width": 6, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": TEXT}
    model = CogVideoXTransformer3DModel(in_channels=in_channels, out_channels=4, text_embed_dim=CHANNELS, **sizes, **shape)
    randomise(model, seed, SHARP)
    pipe = CogVideoXPipeline(None, None, None, model, CogVideoXDDIMScheduler(prediction_type="v_prediction"))
    inputs = inputs_of(dtype, "guidance_scale", None, height=64, width=48, num_frames=5)
    return FamilyBench(finished(pipe, dtype), False, 2 * 4 * 3, inputs, TEXT, text_first=True)


def allegro(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Frames × height × width beside a text whose padding is masked; one batch, [uncond, cond]; a sampler that adds noise."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": 12, "num_layers": 2, "cross_attention_dim": HEADS * 12}
    model = AllegroTransformer3DModel(caption_channels=CHANNELS, sample_height=8, sample_width=6, sample_frames=2, **sizes)
    randomise(model, seed, SHARP)
    pipe = AllegroPipeline(None, None, None, model, EulerAncestralDiscreteScheduler(prediction_type="v_prediction"))
    size = {"height": 64, "width": 48, "num_frames": 5, "negative_prompt": None}
    inputs = inputs_of(dtype, "guidance_scale", "{}prompt_attention_mask", **size)
    return FamilyBench(finished(pipe, dtype), False, 2 * 4 * 3, inputs)


def latte(dtype: torch.dtype = torch.float64, seed: int = 0, frames: int = 3) -> FamilyBench:
    """Within frames, and then along time; one batch, [uncond, cond], of videos × frames rows each; a variance in the output."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 2, "cross_attention_dim": HEADS * DIM}
    shape = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8, "video_length": frames}
    how = {"norm_type": "ada_norm_single", "norm_elementwise_affine": False, "num_embeds_ada_norm": 1000}
    model = LatteTransformer3DModel(caption_channels=CHANNELS, attention_bias=True, **sizes, **shape, **how)
    randomise(model, seed, SHARP)
    pipe = LattePipeline(None, None, None, model, DDIMScheduler(prediction_type="v_prediction"))
    size = {"height": 64, "width": 48, "video_length": frames, "negative_prompt": None, "clean_caption": False}
    inputs = inputs_of(dtype, "guidance_scale", None, **size)
    return FamilyBench(finished(pipe, dtype), False, frames * 4 * 3, inputs, frames=frames)


def mochi(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Video before text, where each sample attends to its text without padding; one batch, [uncond, cond]."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 2, "pooled_projection_dim": 24}
    shape = {"in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 8, "max_sequence_length": TEXT}
    model = MochiTransformer3DModel(**sizes, **shape)
    randomise(model, seed, SHARP)
    pipe = MochiPipeline(flow(), None, None, None, model)
    size = {"height": 64, "width": 48, "num_frames": 7}
    inputs = inputs_of(dtype, "guidance_scale", "{}prompt_attention_mask", channels=16, **size)
    return FamilyBench(finished(pipe, dtype), False, 2 * 4 * 3, inputs, TEXT)


def aura_flow(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Registers and text before the image, in two streams and then in one; one batch, [uncond, cond]."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_mmdit_layers": 1, "num_single_dit_layers": 1}
    text = {"joint_attention_dim": CHANNELS, "caption_projection_dim": HEADS * DIM}
    model = AuraFlowTransformer2DModel(sample_size=8, in_channels=4, out_channels=4, pos_embed_max_size=64, **sizes, **text)
    randomise(model, seed, SHARP)
    pipe = AuraFlowPipeline(None, None, None, model, flow())
    inputs = inputs_of(dtype, "guidance_scale", "{}prompt_attention_mask", height=64, width=80)
    return FamilyBench(finished(pipe, dtype), False, 4 * 5, inputs, TEXT + 8, text_first=True, text_seen=TEXT + 8)


def hunyuan_dit(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """The image beside two texts with learnt padding, and skip connections between blocks; one batch, [uncond, cond]."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "hidden_size": HEADS * DIM, "num_layers": 4}
    model = HunyuanDiT2DModel(in_channels=4, patch_size=2, sample_size=8, activation_fn="gelu", **sizes, **HUNYUAN_TEXTS)
    randomise(model, seed, SHARP)
    parts: dict[str, Any] = dict.fromkeys(["vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    pipe = HunyuanDiTPipeline(transformer=model, scheduler=scheduler(), requires_safety_checker=False, **parts)
    shared = {"height": 64, "width": 80, "use_resolution_binning": False}
    first = inputs_of(dtype, "guidance_scale", "{}prompt_attention_mask", **shared)

    def inputs(seed: int = 0, images: int = 1, **more: Any) -> dict[str, Any]:
        other = torch.Generator().manual_seed(10**6 + seed)
        call, rows = first(seed, images, **more), images * more.get("num_images_per_prompt", 1)
        for prefix in ("", "negative_"):  # embeddings are repeated for several images of a prompt, masks are not
            call[f"{prefix}prompt_attention_mask"] = call[f"{prefix}prompt_attention_mask"][:1].expand(rows, -1)
            call[f"{prefix}prompt_embeds_2"] = torch.randn(images, SECOND[0], SECOND[1], generator=other).to(dtype)
            call[f"{prefix}prompt_attention_mask_2"] = torch.arange(SECOND[0]).lt(2).expand(rows, -1)
        return call

    return FamilyBench(finished(pipe, dtype), False, 4 * 5, inputs, text_seen=TEXT + SECOND[0])


def lumina2(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Text before image, two heads of queries for one of keys, and blocks for the image alone before; two calls."""
    sizes = {"num_attention_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1}
    rope = {"axes_dim_rope": (4, 2, 2), "axes_lens": (32, 32, 32)}
    model = Lumina2Transformer2DModel(in_channels=4, cap_feat_dim=CHANNELS, multiple_of=8, **sizes, **rope)
    randomise(model, seed, SHARP)
    pipe = Lumina2Pipeline(model, flow(), None, None, None)
    masks = ("prompt_attention_mask", "negative_prompt_attention_mask")
    own = inputs_of(dtype, "guidance_scale", None, height=64, width=80)

    def inputs(seed: int = 0, images: int = 1, **more: Any) -> dict[str, Any]:
        shown = torch.arange(TEXT + 2).lt(TEXT).expand(images, -1)  # the pipeline removes the padding
        call = own(seed, images, **dict.fromkeys(masks, shown) | more)
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            call[name] = torch.nn.functional.pad(call[name], (0, 0, 0, 2))
        return call

    return FamilyBench(finished(pipe, dtype), True, 4 * 5, inputs, TEXT, text_first=True, two_calls=True)


def flux2(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Text before image, in two streams and then in one, whose attention contains the feed-forward; two calls."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 1, "num_single_layers": 2}
    more = {"timestep_guidance_channels": 16, "axes_dims_rope": (2, 2, 2, 2), "guidance_embeds": False}
    model = Flux2Transformer2DModel(in_channels=16, joint_attention_dim=CHANNELS, **sizes, **more)
    randomise(model, seed + 3, SHARP)  # with other weights a headwise search saves little
    pipe = Flux2KleinPipeline(flow(), vae(seed + 1, halvings=3, cls=AutoencoderKLFlux2), None, None, model)
    inputs = inputs_of(dtype, "guidance_scale", None, height=64, width=80)
    return FamilyBench(finished(pipe, dtype), True, 4 * 5, inputs, TEXT, text_first=True, two_calls=True)


def z_image(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Image before text, both in lists and padded to 32 tokens; one batch, [cond, uncond]."""
    sizes = {"dim": HEADS * DIM, "n_heads": HEADS, "n_kv_heads": HEADS, "n_layers": 2, "n_refiner_layers": 1}
    rope = {"axes_dims": [4, 2, 2], "axes_lens": [128, 64, 64]}
    model = ZImageTransformer2DModel(in_channels=4, cap_feat_dim=CHANNELS, **sizes, **rope)
    randomise(model, seed + 2, (".attention.",))  # with other weights a headwise search saves little
    pipe = ZImagePipeline(flow(), None, None, None, model)
    own = inputs_of(dtype, "guidance_scale", None, height=64, width=80)

    def inputs(seed: int = 0, images: int = 1, guidance: float = 3.0, **more: Any) -> dict[str, Any]:
        call = own(seed, images, guidance - 1, **more)
        return call | {name: list(call[name]) for name in ("prompt_embeds", "negative_prompt_embeds")}

    return FamilyBench(finished(pipe, dtype), True, 32, inputs, 32, text_seen=32)


def ovis_image(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """FLUX's blocks with gated feed-forwards; two calls."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 1, "num_single_layers": 1}
    rope = {"axes_dims_rope": (2, 2, 4)}
    model = OvisImageTransformer2DModel(in_channels=16, out_channels=16, joint_attention_dim=CHANNELS, **sizes, **rope)
    randomise(model, seed, SHARP)
    pipe = OvisImagePipeline(flow(), None, None, None, model)
    inputs = inputs_of(dtype, "guidance_scale", None, height=64, width=80, negative_prompt=None)
    return FamilyBench(finished(pipe, dtype), True, 4 * 5, inputs, TEXT, text_first=True, two_calls=True)


def bria(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """FLUX's blocks; one batch, [uncond, cond]."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 1, "num_single_layers": 1}
    model = BriaTransformer2DModel(in_channels=16, joint_attention_dim=CHANNELS, axes_dims_rope=[2, 2, 4], **sizes)
    randomise(model, seed, SHARP)
    pipe = BriaPipeline(model, flow(), vae(seed + 1, halvings=3), None, None)
    inputs = inputs_of(dtype, "guidance_scale", None, height=64, width=80)
    return FamilyBench(finished(pipe, dtype), False, 4 * 5, inputs, TEXT, text_first=True)


def cogview4(dtype: torch.dtype = torch.float64, seed: int = 0, in_channels: int = 4) -> FamilyBench:
    """Text before image through the same layers, positions of the image alone; two calls."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 2, "time_embed_dim": 8}
    more = {"condition_dim": 4, "text_embed_dim": CHANNELS, "rope_axes_dim": (8, 8), "sample_size": 8}
    model = CogView4Transformer2DModel(in_channels=in_channels, out_channels=4, **sizes, **more)
    randomise(model, seed, SHARP)
    pipe = CogView4Pipeline(None, None, None, model, flow())
    inputs = inputs_of(dtype, "guidance_scale", None, height=64, width=80)
    return FamilyBench(finished(pipe, dtype), True, 4 * 5, inputs, TEXT, text_first=True, two_calls=True)


def cogview3(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Text before image through the same layers, in feed-forwards, too; one batch, [uncond, cond]."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 2, "time_embed_dim": 8}
    more = {"condition_dim": 4, "text_embed_dim": CHANNELS, "pos_embed_max_size": 8, "sample_size": 8}
    model = CogView3PlusTransformer2DModel(in_channels=4, out_channels=4, **sizes, **more)
    randomise(model, seed, SHARP)
    pipe = CogView3PlusPipeline(None, None, None, model, CogVideoXDDIMScheduler(prediction_type="v_prediction"))
    inputs = inputs_of(dtype, "guidance_scale", None, height=64, width=80)
    return FamilyBench(finished(pipe, dtype), False, 4 * 5, inputs, TEXT, text_first=True)


def skyreels(dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any) -> FamilyBench:
    """Frames × height × width beside a text; two calls."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 2, "ffn_dim": 32, "freq_dim": 16}
    standard = {"in_channels": 4, "out_channels": 4, "text_dim": CHANNELS, "rope_max_seq_len": 32, **sizes}
    model = SkyReelsV2Transformer3DModel(**standard | config)
    randomise(model, seed, SHARP)
    pipe = SkyReelsV2Pipeline(None, None, model, None, flow())
    inputs = inputs_of(dtype, "guidance_scale", None, height=64, width=48, num_frames=5)
    return FamilyBench(finished(pipe, dtype), True, 2 * 4 * 3, inputs, two_calls=True)


def wan_vace(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """As `wan`, with a block that gives the first of four blocks what to follow; one video in a call."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 4, "ffn_dim": 32, "freq_dim": 16}
    shape = {"in_channels": 4, "out_channels": 4, "text_dim": CHANNELS, "rope_max_seq_len": 32}
    model = WanVACETransformer3DModel(vace_layers=[0], vace_in_channels=2 * 4 + 8 * 8, **shape, **sizes)
    randomise(model, seed, SHARP)
    pipe = WanVACEPipeline(None, None, wan_vae(seed + 1), flow(), model)
    own = inputs_of(dtype, "guidance_scale", None, height=64, width=48, num_frames=5)

    def inputs(seed: int = 0, images: int = 1, **more: Any) -> dict[str, Any]:
        return own(seed, 1, **more)

    bench = FamilyBench(finished(pipe, dtype), True, 2 * 4 * 3, inputs, two_calls=True, single=True)
    pipe.vae.float()  # the pipeline gives it the video in 32 bits
    return bench


MORE: dict[str, Callable[..., FamilyBench]] = {
    "wan": wan,
    "wan22": wan22,
    "qwen": qwen,
    "chroma": chroma,
    "hunyuan_video": hunyuan_video,
    "ltx": ltx,
    "cogvideox": cogvideox,
    "allegro": allegro,
    "latte": latte,
    "mochi": mochi,
    "aura_flow": aura_flow,
    "hunyuan_dit": hunyuan_dit,
    "lumina2": lumina2,
    "flux2": flux2,
    "z_image": z_image,
    "ovis_image": ovis_image,
    "bria": bria,
    "cogview4": cogview4,
    "cogview3": cogview3,
    "skyreels": skyreels,
    "wan_vace": wan_vace,
    **IMAGES,
    **VIDEO,
}
