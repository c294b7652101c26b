"""Small pipelines of further families of videos: diffusers' classes, random weights, no text encoder."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLMagvit,
    AutoencoderKLWan,
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    ClassifierFreeGuidance,
    Cosmos2_5_PredictBasePipeline,
    CosmosTransformer3DModel,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMapEulerDiscreteScheduler,
    HeliosPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
)
from family_bench import CHANNELS, DIM, HEADS, SHARP, TEXT, FamilyBench, finished, flow, inputs_of
from PIL import Image
from pipelines import POOLED, randomise

SECOND = (3, 8)  # text tokens and channels of a second text encoder
IMAGE = (2, 10)  # tokens and channels of an image's embeddings
WAN = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 2, "ffn_dim": 32, "freq_dim": 16}


def wan_vae(seed: int = 1) -> AutoencoderKLWan:
    means = {"latents_mean": [0.1] * 4, "latents_std": [1.1] * 4}
    made = AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **means)
    randomise(made, seed)
    return made


def guided_by_guider(bench: FamilyBench) -> FamilyBench:
    """A bench whose guidance scale is the guider's."""
    own, pipe = bench.inputs, bench.pipe

    def inputs(seed: int = 0, images: int = 1, guidance: float = 3.0, **more: Any) -> dict[str, Any]:
        pipe.guider.guidance_scale = guidance
        call = own(seed, images, **more)
        call.pop("guidance_scale")
        return call

    bench.inputs = inputs
    return bench


def hunyuan_vae15() -> AutoencoderKLHunyuanVideo15:
    return AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1)


def hunyuan_video15(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Video before two texts and the tokens of an image, padding masked; two calls, by a guider."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 2, "num_refiner_layers": 1}
    text = {"text_embed_dim": CHANNELS, "text_embed_2_dim": SECOND[1], "image_embed_dim": IMAGE[1]}
    shape = {"in_channels": 9, "out_channels": 4, "rope_axes_dim": (2, 2, 4), "target_size": 64}
    model = HunyuanVideo15Transformer3DModel(**sizes, **text, **shape)
    model.context_embedder_2 = type(model.context_embedder_2)(SECOND[1], 16, HEADS * DIM)  # it is 2048 channels wide
    randomise(model, seed, SHARP)
    vae = hunyuan_vae15()
    parts: dict[str, Any] = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    pipe = HunyuanVideo15Pipeline(transformer=model, scheduler=flow(), guider=ClassifierFreeGuidance(), vae=vae, **parts)
    pipe.vision_num_semantic_tokens = IMAGE[0]
    own = inputs_of(dtype, "guidance_scale", "{}prompt_embeds_mask", height=64, width=48, num_frames=5)

    def inputs(seed: int = 0, images: int = 1, **more: Any) -> dict[str, Any]:
        other = torch.Generator().manual_seed(10**6 + seed)
        call = own(seed, images, **more)
        for prefix in ("", "negative_"):
            call[f"{prefix}prompt_embeds_2"] = torch.randn(images, *SECOND, generator=other).to(dtype)
            call[f"{prefix}prompt_embeds_mask_2"] = torch.arange(SECOND[0]).lt(2).expand(images, -1)
        return call

    text = TEXT + SECOND[0] + IMAGE[0]
    bench = FamilyBench(finished(pipe, dtype), True, 2 * 4 * 3, inputs, text, text_seen=text, two_calls=True)
    return guided_by_guider(bench)


def motif(dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any) -> FamilyBench:
    """Video before text, in two streams and then in one, whose last block sees the video twice; two calls, by a guider."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 2, "num_single_layers": 2}
    shape = {"in_channels": 9, "out_channels": 4, "rope_axes_dim": (2, 2, 4), "num_decoder_layers": 1}
    model = MotifVideoTransformer3DModel(text_embed_dim=CHANNELS, **sizes, **shape, **config)
    randomise(model, seed, SHARP)
    pipe = MotifVideoPipeline(flow(), wan_vae(seed + 1), None, None, model, ClassifierFreeGuidance())
    inputs = inputs_of(dtype, "guidance_scale", "{}prompt_attention_mask", height=64, width=48, num_frames=5)
    bench = FamilyBench(finished(pipe, dtype), True, 2 * 4 * 3, inputs, TEXT, two_calls=True)
    return guided_by_guider(bench)


def magvit(seed: int = 1) -> AutoencoderKLMagvit:
    blocks = {"block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 4}
    made = AutoencoderKLMagvit(latent_channels=4, **blocks)
    randomise(made, seed)
    return made


def easy_animate(dtype: torch.dtype = torch.float64, seed: int = 0, extra: int = 0) -> FamilyBench:
    """Text before video, in two streams; one batch, [uncond, cond]."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": 16, "num_layers": 2, "mmdit_layers": 2}
    shape = {"in_channels": 4 + extra, "out_channels": 4, "patch_size": 2, "time_embed_dim": 8}
    model = EasyAnimateTransformer3DModel(text_embed_dim=CHANNELS, **sizes, **shape)
    randomise(model, seed, SHARP)
    pipe = EasyAnimatePipeline(magvit(), None, None, model, flow())
    size = {"height": 64, "width": 48, "num_frames": 5}
    inputs = inputs_of(dtype, "guidance_scale", "{}prompt_attention_mask", **size)
    return FamilyBench(finished(pipe, dtype), False, 2 * 4 * 3, inputs, TEXT, text_first=True)


def chrono_edit(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Two frames, of which the first is the picture, beside a text and an image's embeddings; two calls."""
    image = {"image_dim": 16, "added_kv_proj_dim": 16}
    shape = {"in_channels": 12, "out_channels": 4, "text_dim": CHANNELS, "rope_max_seq_len": 32}
    model = ChronoEditTransformer3DModel(**shape, **WAN, **image)
    randomise(model, seed, SHARP)
    pipe = ChronoEditPipeline(None, None, None, None, model, wan_vae(seed + 1), flow())
    generator = torch.Generator().manual_seed(2)
    picture, embeds = torch.rand(1, 3, 64, 48, generator=generator), torch.randn(1, 5, 16, generator=generator)
    inputs = inputs_of(dtype, "guidance_scale", None, height=64, width=48, image=picture)
    bench = FamilyBench(finished(pipe, dtype), True, 2 * 4 * 3, inputs, two_calls=True, text_seen=0)
    pipe.encode_image = lambda *_: embeds
    pipe.vae.float()  # the pipeline gives it the picture in 32 bits
    return bench


def anyflow(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Frames × height × width beside a text, with two timesteps for each frame; one batch, [uncond, cond]."""
    shape = {"in_channels": 4, "out_channels": 4, "text_dim": CHANNELS, "rope_max_seq_len": 32}
    model = AnyFlowTransformer3DModel(**shape, **WAN)
    randomise(model, seed, SHARP)
    pipe = AnyFlowPipeline(None, None, model, None, FlowMapEulerDiscreteScheduler())
    own = inputs_of(dtype, "guidance_scale", None, height=64, width=48, num_frames=5)

    def inputs(seed: int = 0, images: int = 1, guidance: float = 3.0, **more: Any) -> dict[str, Any]:
        call = own(seed, images, guidance, **more)
        return call if guidance > 1 else {name: value for name, value in call.items() if "negative" not in name}

    return FamilyBench(finished(pipe, dtype), False, 2 * 4 * 3, inputs)


def cosmos_transformer(seed: int, **config: Any) -> CosmosTransformer3DModel:
    sizes = {
        "num_attention_heads": HEADS,
        "attention_head_dim": 16,
        "num_layers": 2,
        "adaln_lora_dim": 4,
        "max_size": (4, 16, 16),
    }
    shape = {"in_channels": 5, "out_channels": 4, "text_embed_dim": CHANNELS, "max_size": (4, 16, 16)}
    shape |= {"concat_padding_mask": False, "extra_pos_embed_type": None}  # torchvision is not needed, and 64 bits do
    model = CosmosTransformer3DModel(**shape | sizes | config)
    randomise(model, seed, SHARP)
    return model


class Unguarded:
    """Stands for Cosmos' check of texts and videos, which needs a package and weights."""

    def to(self, _: Any) -> None: ...


def cosmos(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Frames × height × width beside a text, with a timestep for each frame; two calls; it computes with the first output."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = {"scheduler": scheduler, "vae": wan_vae(seed + 1), "safety_checker": Unguarded()}
    pipe = Cosmos2_5_PredictBasePipeline(None, None, transformer=cosmos_transformer(seed), **parts)
    inputs = inputs_of(dtype, "guidance_scale", None, height=64, width=48, num_frames=5)
    return FamilyBench(finished(pipe, dtype), True, 2 * 4 * 3, inputs, two_calls=True)


def kandinsky5(dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any) -> FamilyBench:
    """Frames × height × width × channels beside a text that has blocks before; two calls; latents that change in place."""
    sizes = {"model_dim": 16, "ff_dim": 32, "time_dim": 8, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (2, 2, 4)}
    text = {"in_text_dim": CHANNELS, "in_text_dim2": POOLED}
    model = Kandinsky5Transformer3DModel(in_visual_dim=4, out_visual_dim=4, **sizes, **text, **config)
    randomise(model, seed, (".self_attention.",))
    parts: dict[str, Any] = dict.fromkeys(["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    pipe = Kandinsky5T2VPipeline(transformer=model, scheduler=flow(), **parts)
    own = inputs_of(dtype, "guidance_scale", None, pooled=True, height=64, width=48, num_frames=5)

    def inputs(seed: int = 0, images: int = 1, **more: Any) -> dict[str, Any]:
        call = own(seed, images, **more)
        for prefix in ("", "negative_"):
            call[f"{prefix}prompt_embeds_qwen"] = call.pop(f"{prefix}prompt_embeds")
            call[f"{prefix}prompt_embeds_clip"] = call.pop(f"{prefix}pooled_prompt_embeds")
            call[f"{prefix}prompt_cu_seqlens"] = torch.arange(images + 1) * TEXT
        return call

    finished(pipe, dtype)
    for name, module in model.named_modules():  # as diffusers loads them
        if "time_embeddings" in name or (name.endswith("modulation") and dtype != torch.float64):
            module.float()
    return FamilyBench(pipe, True, 2 * 4 * 3, inputs, two_calls=True)


class Codec:
    """Stands for LTX-2's VAEs of video and audio: a picture's latents are constants that follow its sum."""

    spatial_compression_ratio, temporal_compression_ratio, mel_compression_ratio = 32, 8, 4
    latents_mean, latents_std = torch.zeros(4), torch.ones(4)
    dtype = torch.float64

    def __init__(self, width: int) -> None:
        self.latents_mean, self.latents_std = torch.zeros(width), torch.ones(width)
        sizes = {"sample_rate": 16000, "mel_hop_length": 160, "mel_bins": 8, "latent_channels": 4}
        self.config = SimpleNamespace(scaling_factor=1.0, **sizes)

    def encode(self, video: torch.Tensor) -> SimpleNamespace:
        batch, _, frames, height, width = video.shape
        return SimpleNamespace(latents=video.mean().expand(batch, 4, (frames - 1) // 8 + 1, height // 32, width // 32))


class Connectors:
    """Stands for what LTX-2 makes of a prompt's embeddings for video and audio."""

    def __call__(self, embeds: torch.Tensor, mask: torch.Tensor, padding_side: str) -> tuple[torch.Tensor, ...]:
        return embeds, embeds.flip(1), mask


def ltx2(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Packed frames and audio, each beside a text and the other; one batch, [uncond, cond]; gates for each head."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 2, "cross_attention_dim": HEADS * DIM}
    audio = {"in_channels": 8, "out_channels": 8, "num_attention_heads": HEADS, "attention_head_dim": DIM}
    audio |= {"cross_attention_dim": HEADS * DIM, "gated_attn": True}
    more = {"in_channels": 4, "out_channels": 4, "caption_channels": CHANNELS, "gated_attn": True, "perturbed_attn": True}
    model = LTX2VideoTransformer3DModel(**sizes, **more, **{f"audio_{name}": value for name, value in audio.items()})
    randomise(model, seed, SHARP)
    parts: dict[str, Any] = dict.fromkeys(["text_encoder", "tokenizer", "vocoder"])
    parts |= {"vae": Codec(4), "audio_vae": Codec(8), "connectors": Connectors()}
    pipe = LTX2Pipeline(transformer=model, scheduler=flow(), **parts)
    off = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
    size = {"height": 128, "width": 96, "num_frames": 9, "audio_guidance_scale": None}
    inputs = inputs_of(dtype, "guidance_scale", "{}prompt_attention_mask", **size, **off)
    return FamilyBench(finished(pipe, dtype), False, 2 * 4 * 3, inputs)


def hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    down, up = ("HunyuanVideoDownBlock3D",) * 4, ("HunyuanVideoUpBlock3D",) * 4
    sizes = {"block_out_channels": (8,) * 4, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
    return AutoencoderKLHunyuanVideo(down_block_types=down, up_block_types=up, **sizes)


def framepack(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """A history and a video before the tokens of an image and a text; two calls; two sections, each with a loop."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 1, "num_single_layers": 1}
    text = {"text_embed_dim": CHANNELS, "pooled_projection_dim": POOLED, "num_refiner_layers": 1}
    more = {"has_image_proj": True, "image_proj_dim": IMAGE[1], "has_clean_x_embedder": True}
    shape = {"in_channels": 4, "out_channels": 4, "rope_axes_dim": (2, 2, 4)}
    model = HunyuanVideoFramepackTransformer3DModel(**sizes, **text, **shape, **more)
    randomise(model, seed, SHARP)
    vae = hunyuan_vae()
    randomise(vae, seed + 1)
    pipe = HunyuanVideoFramepackPipeline(None, None, model, vae, flow(), None, None, None, None)
    embeds = torch.randn(1, *IMAGE, generator=torch.Generator().manual_seed(2)).to(dtype)
    size = {"height": 64, "width": 48, "num_frames": 9, "latent_window_size": 2, "output_type": "pt"}
    own = inputs_of(dtype, "true_cfg_scale", None, pooled=True, **size)

    def inputs(seed: int = 0, images: int = 1, **more: Any) -> dict[str, Any]:
        picture = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(seed))
        call, shown = own(seed, images, **more), torch.ones(images, TEXT)
        masks = dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), shown)
        return call | masks | {"image": picture.expand(images, -1, -1, -1)}

    text_tokens = IMAGE[0] + TEXT
    bench = FamilyBench(finished(pipe, dtype), True, 2 * 12 + (2 * 12 + 4 + 4), inputs, text_tokens, two_calls=True, loops=2)
    pipe.encode_image = lambda image, **_: embeds.expand(len(image), -1, -1)
    bench.text_seen = text_tokens
    return bench


def wan_animate(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """A reference's frame before the video's, beside a text and an image; two calls; two segments, each with a loop."""
    image = {"image_dim": 16, "added_kv_proj_dim": 16}
    shape = {"in_channels": 12, "latent_channels": 4, "out_channels": 4, "text_dim": CHANNELS, "rope_max_seq_len": 32}
    face = {"motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16, "motion_style_dim": 8}
    face |= {"motion_dim": 4, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 8, "face_encoder_num_heads": 2}
    model = WanAnimateTransformer3DModel(**shape, **WAN, **image, **face, inject_face_latents_blocks=1)
    randomise(model, seed, SHARP)
    pipe = WanAnimatePipeline(None, None, wan_vae(seed + 1), flow(), None, None, model)
    picture = Image.linear_gradient("L").resize((48, 64)).convert("RGB")
    poses, faces = ([picture.resize(size).rotate(20 * i) for i in range(9)] for size in ((48, 64), (16, 16)))
    embeds = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    size: dict[str, Any] = {"height": 64, "width": 48, "segment_frame_length": 5}
    size |= {"image": picture, "pose_video": poses, "face_video": faces}
    inputs = inputs_of(dtype, "guidance_scale", None, **size)
    bench = FamilyBench(finished(pipe, dtype), True, 3 * 4 * 3, inputs, two_calls=True, text_seen=0, loops=2)
    pipe.encode_image = lambda *_: embeds
    pipe.vae.float()  # the pipeline gives it videos in 32 bits
    return bench


def helios(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """A history before the frames, beside a text that the history does not see; two calls; two chunks, each with a loop."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 2, "ffn_dim": 32, "freq_dim": 16}
    shape = {"in_channels": 4, "out_channels": 4, "text_dim": CHANNELS, "rope_dim": (4, 2, 2), "is_amplify_history": True}
    model = HeliosTransformer3DModel(**shape, **sizes)
    randomise(model, seed, SHARP)
    pipe = HeliosPipeline(None, None, wan_vae(seed + 1), HeliosScheduler(stages=1, stage_range=[0, 1]), model)
    size = {"height": 64, "width": 48, "num_frames": 9, "history_sizes": [4, 2, 1], "num_latent_frames_per_chunk": 2}
    inputs = inputs_of(dtype, "guidance_scale", None, **size)
    return FamilyBench(finished(pipe, dtype), True, 2 * 12 + (2 * 12 + 4 + 1), inputs, two_calls=True, text_seen=0, loops=2)


VIDEO: dict[str, Callable[..., FamilyBench]] = {
    "hunyuan_video15": hunyuan_video15,
    "easy_animate": easy_animate,
    "chrono_edit": chrono_edit,
    "anyflow": anyflow,
    "cosmos": cosmos,
    "kandinsky5": kandinsky5,
    "ltx2": ltx2,
    "framepack": framepack,
    "wan_animate": wan_animate,
    "helios": helios,
    "motif": motif,
}
