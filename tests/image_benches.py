"""Small pipelines of the families in `image_families`: diffusers' classes, random weights, no text encoder."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    AceStepPipeline,
    AceStepTransformer1DModel,
    AdaptiveProjectedMixGuidance,
    AutoencoderOobleck,
    BriaFibo2Pipeline,
    BriaFibo2Transformer2DModel,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    EDMDPMSolverMultistepScheduler,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    JoyImageEditPipeline,
    JoyImageEditPlusPipeline,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatAudioDiTPipeline,
    LongCatAudioDiTTransformer,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    ModelMixin,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.transformers.transformer_hunyuanimage import HunyuanImageByT5TextProjection
from family_bench import CHANNELS, DIM, HEADS, SHARP, TEXT, FamilyBench, finished, flow, inputs_of
from pipelines import POOLED, randomise

SECOND = (3, 8)  # text tokens and channels of a second text encoder
NOT = "not "
"""What negative prompts begin with, where a bench encodes prompts."""


def embedded(prompts: Sequence[str], *shape: int) -> torch.Tensor:
    """Random embeddings (B, *shape) that depend on the prompts alone."""
    seeds = [torch.Generator().manual_seed(zlib.crc32(prompt.encode())) for prompt in prompts]
    return torch.stack([torch.randn(*shape, generator=seed, dtype=torch.float64) for seed in seeds])


def prompts_of(seed: int, images: int) -> dict[str, list[str]]:
    """The prompts of a call, and the negative ones."""
    return {
        name: [f"{prefix}{seed}, {i}" for i in range(images)] for name, prefix in (("prompt", ""), ("negative_prompt", NOT))
    }


def worded(dtype: torch.dtype, **common: Any) -> Callable[..., dict[str, Any]]:
    """The arguments of a call of a pipeline that encodes its prompts."""

    def inputs(seed: int = 0, images: int = 1, guidance: float = 3.0, steps: int = 5, **more: Any) -> dict[str, Any]:
        call = {"guidance_scale": guidance, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed)}
        return prompts_of(seed, images) | call | {"output_type": "latent"} | common | more

    return inputs


def longcat_image(dtype: torch.dtype = torch.float64, seed: int = 0, **common: Any) -> FamilyBench:
    """FLUX's blocks, with positions that begin after those of the text; two calls."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 1, "num_single_layers": 1}
    rope = {"axes_dims_rope": [2, 2, 4], "pooled_projection_dim": 8}
    model = LongCatImageTransformer2DModel(in_channels=64, joint_attention_dim=CHANNELS, **sizes, **rope)
    randomise(model, seed, SHARP)
    pipe = LongCatImagePipeline(flow(), None, None, None, None, model)
    pipe._encode_prompt = lambda prompt: embedded(prompt, TEXT, CHANNELS).to(dtype)
    inputs = worded(dtype, height=64, width=80, enable_prompt_rewrite=False)
    return FamilyBench(finished(pipe, dtype), True, 4 * 5, inputs, TEXT, text_first=True, two_calls=True)


def bria_fibo(dtype: torch.dtype = torch.float64, seed: int = 0, in_channels: int = 16) -> FamilyBench:
    """FLUX's blocks, each with another layer's text, padding masked; one batch, [uncond, cond]."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 1, "num_single_layers": 1}
    text = {"joint_attention_dim": CHANNELS, "text_encoder_dim": CHANNELS}
    model = BriaFiboTransformer2DModel(in_channels=in_channels, axes_dims_rope=[2, 2, 4], **sizes, **text)
    randomise(model, seed, SHARP)
    pipe = BriaFiboPipeline(model, flow(), None, None, None)
    encode_in_layers(pipe, dtype)
    inputs = worded(dtype, height=64, width=80)
    return FamilyBench(finished(pipe, dtype), False, 4 * 5, inputs, TEXT, text_first=True)


def encode_in_layers(pipe: Any, dtype: torch.dtype) -> None:
    """Let a FIBO pipeline encode prompts without an encoder: positive ones have two tokens fewer, the rest is padding."""

    def encode(prompt: Any, num_images_per_prompt: int = 1, **_: Any) -> Any:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        every = embedded(prompts, 3, TEXT, CHANNELS).to(dtype).repeat_interleave(num_images_per_prompt, 0)
        shown = torch.tensor([TEXT if text.startswith(NOT) else TEXT - 2 for text in prompts])
        mask = torch.arange(TEXT).lt(shown[:, None]).to(dtype).repeat_interleave(num_images_per_prompt, 0)
        return every[:, 0], [every[:, 1], every[:, 2]], mask

    class Encoder:
        def __init__(self) -> None:
            self.dtype = dtype

    pipe.get_prompt_embeds, pipe.text_encoder = encode, None
    object.__setattr__(pipe, "text_encoder", Encoder())


def ernie_image(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Image before text, padding masked; one batch, [uncond, cond]."""
    sizes = {"num_attention_heads": HEADS, "hidden_size": HEADS * DIM, "num_layers": 2, "ffn_hidden_size": 32}
    shape = {"in_channels": 8, "out_channels": 8, "text_in_dim": CHANNELS, "rope_axes_dim": (2, 2, 4)}
    model = ErnieImageTransformer2DModel(**sizes, **shape)
    randomise(model, seed, (".self_attention.",))
    pipe = ErnieImagePipeline(model, None, None, None, flow())
    own = inputs_of(dtype, "guidance_scale", None, height=64, width=80)

    def inputs(seed: int = 0, images: int = 1, **more: Any) -> dict[str, Any]:
        call = own(seed, images, **more)
        short = [text[: TEXT - 2] for text in call["negative_prompt_embeds"]]
        return call | {"prompt_embeds": list(call["prompt_embeds"]), "negative_prompt_embeds": short}

    return FamilyBench(finished(pipe, dtype), False, 4 * 5, inputs, TEXT)


def krea2(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Text before image through the same layers, two heads of queries for one of keys, with a gate; two calls."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_head_dim": DIM, "num_layers": 2}
    text = {"text_hidden_dim": CHANNELS, "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2}
    blocks = {"num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "text_intermediate_size": 16}
    more = {"in_channels": 16, "intermediate_size": 32, "timestep_embed_dim": 8, "axes_dims_rope": (4, 2, 2)}
    model = Krea2Transformer2DModel(**sizes, **text, **blocks, **more)
    randomise(model, seed, SHARP)
    pipe = Krea2Pipeline(flow(), None, None, None, model)
    own = inputs_of(dtype, "guidance_scale", "{}prompt_embeds_mask", height=64, width=80)

    def inputs(seed: int = 0, images: int = 1, guidance: float = 3.0, **more: Any) -> dict[str, Any]:
        call = own(seed, images, guidance - 1, **more)
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            call[name] = torch.stack([call[name], call[name].flip(1)], 2)  # two layers
        return call

    return FamilyBench(finished(pipe, dtype), True, 4 * 5, inputs, TEXT, text_first=True, two_calls=True)


def glm_image(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """CogView4's blocks, and tokens of a language model added to the image's; two calls."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 2, "time_embed_dim": 8}
    more = {"condition_dim": 4, "text_embed_dim": CHANNELS, "prior_vq_quantizer_codebook_size": 16}
    model = GlmImageTransformer2DModel(in_channels=4, out_channels=4, **sizes, **more)
    randomise(model, seed, SHARP)
    pipe = GlmImagePipeline(None, None, None, None, None, model, flow())
    own = inputs_of(dtype, "guidance_scale", None, height=64, width=80)

    def inputs(seed: int = 0, images: int = 1, **more: Any) -> dict[str, Any]:
        call = own(seed, images, **more)
        tokens = call["height"] * call["width"] // 16**2
        prior = torch.randint(16, (images, tokens), generator=torch.Generator().manual_seed(10**6 + seed))
        return {"prior_token_ids": prior} | call

    return FamilyBench(finished(pipe, dtype), True, 4 * 5, inputs, TEXT, text_first=True, two_calls=True)


def hunyuan_image(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Image before two texts, in two streams and then in one, padding masked; two calls, by a guider."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 1, "num_single_layers": 1}
    shape = {"in_channels": 4, "out_channels": 4, "num_refiner_layers": 1, "rope_axes_dim": (4, 4)}
    model = HunyuanImageTransformer2DModel(text_embed_dim=CHANNELS, **sizes, **shape)
    model.context_embedder_2 = HunyuanImageByT5TextProjection(SECOND[1], 16, HEADS * DIM)  # diffusers' is 2048 wide
    randomise(model, seed, (*SHARP, ".attn."))
    guider = AdaptiveProjectedMixGuidance(guidance_scale=3.0, adaptive_projected_guidance_start_step=2)
    pipe = HunyuanImagePipeline(flow(), None, None, None, None, None, model, guider)
    own = inputs_of(dtype, "guidance", "{}prompt_embeds_mask", height=128, width=160)

    def inputs(seed: int = 0, images: int = 1, guidance: float = 3.0, **more: Any) -> dict[str, Any]:
        call, other = own(seed, images, **more), torch.Generator().manual_seed(10**6 + seed)
        del call["guidance"]
        pipe.guider.guidance_scale = guidance
        for prefix, shown in (("", 2), ("negative_", 3)):
            call[f"{prefix}prompt_embeds_2"] = torch.randn(images, *SECOND, generator=other).to(dtype)
            call[f"{prefix}prompt_embeds_mask_2"] = torch.arange(SECOND[0]).lt(shown).expand(images, -1)
        return call

    return FamilyBench(finished(pipe, dtype), True, 4 * 5, inputs, TEXT + 3, text_seen=TEXT + 3, two_calls=True)


def hidream(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Image before texts of two encoders, one with a text for each block, in two streams and then in one; one batch."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 1, "num_single_layers": 1}
    text = {"caption_channels": [SECOND[1], CHANNELS], "text_emb_dim": POOLED, "llama_layers": [0, 1]}
    shape = {"patch_size": 2, "in_channels": 4, "axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8)}
    model = HiDreamImageTransformer2DModel(num_routed_experts=2, num_activated_experts=1, **sizes, **text, **shape)
    randomise(model, seed, SHARP)
    pipe = HiDreamImagePipeline(flow(), *[None] * 9, model)
    pipe.default_sample_size = 8
    own = inputs_of(dtype, "guidance_scale", None, pooled=True, height=64, width=64)

    def inputs(seed: int = 0, images: int = 1, **more: Any) -> dict[str, Any]:
        call, other = own(seed, images, **more), torch.Generator().manual_seed(10**6 + seed)
        for prefix in ("", "negative_"):
            prompts = call.pop(f"{prefix}prompt_embeds")
            call[f"{prefix}prompt_embeds_llama3"] = torch.stack([prompts, prompts.flip(1)])
            call[f"{prefix}prompt_embeds_t5"] = torch.randn(images, *SECOND, generator=other).to(dtype)
        return call

    text_tokens = 2 * TEXT + SECOND[0]
    return FamilyBench(finished(pipe, dtype), False, 4 * 4, inputs, text_tokens, text_seen=text_tokens)


def lumina_next(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """The image alone, beside a text; one batch, [cond, uncond], of which three of four channels are guided."""
    sizes = {"num_attention_heads": HEADS, "num_kv_heads": HEADS, "hidden_size": 16, "num_layers": 2, "multiple_of": 8}
    model = LuminaNextDiT2DModel(cross_attention_dim=CHANNELS, sample_size=8, **sizes)
    randomise(model, seed, SHARP)
    pipe = LuminaPipeline(model, flow(), None, None, None)
    inputs = inputs_of(dtype, "guidance_scale", "{}prompt_attention_mask", height=64, width=80, negative_prompt=None)
    return FamilyBench(finished(pipe, dtype), True, 4 * 5, inputs, text_seen=0)


def fibo2(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """A summary of the text before the image, and cross-attention in one block; two calls."""
    sizes = {"dim": HEADS * 32, "n_heads": HEADS, "n_layers": 2, "n_refiner_layers": 1, "perceiver_num_layers": 1}
    gist = {"min_num_gist_tokens": 2, "max_num_gist_tokens": 8, "gist_step": 2, "gist_min_text_len": 2, "gist_max_text_len": 10}
    rope = {"axes_dims": (16, 8, 8), "axes_lens": (32, 32, 32)}
    more = {"in_channels": 4, "cap_feat_dim": CHANNELS, "injection_layer_ids": (1,)}
    model = BriaFibo2Transformer2DModel(**sizes, **gist, **rope, **more)
    randomise(model, seed, (".attention.",))
    pipe = BriaFibo2Pipeline(model, flow(), None, None, None)
    own = inputs_of(dtype, "guidance_scale", "{}prompt_embeds_mask", height=64, width=80)

    def inputs(seed: int = 0, images: int = 1, **more: Any) -> dict[str, Any]:
        call = own(seed, images, **more)
        for prefix in ("", "negative_"):
            call[f"{prefix}prompt_embeds"] = torch.stack([call[f"{prefix}prompt_embeds"]] * 2, 1)
            call[f"{prefix}prompt_embeds_mask"] = torch.ones(images, TEXT, dtype=torch.bool)
        return call

    return FamilyBench(finished(pipe, dtype), True, 4 * 5, inputs, 6, text_first=True, text_seen=6, two_calls=True)


def joy_image(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Image before text in two streams; two calls."""
    sizes = {"num_attention_heads": HEADS, "hidden_size": HEADS * DIM, "num_layers": 2, "rope_dim_list": [2, 2, 4]}
    model = JoyImageEditTransformer3DModel(in_channels=4, text_dim=CHANNELS, **sizes)
    randomise(model, seed, SHARP)
    pipe = JoyImageEditPipeline(flow(), None, None, None, model, None)
    pipe.vae_image_processor.get_default_height_width = lambda _, height, width: (height, width)
    inputs = inputs_of(dtype, "guidance_scale", "{}prompt_embeds_mask", height=64, width=80)
    return FamilyBench(finished(pipe, dtype), True, 4 * 5, inputs, TEXT, two_calls=True)


def joy_image_plus(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Patches of images before a text, in two streams, padding masked; one batch, [uncond, cond]."""
    sizes = {"num_attention_heads": HEADS, "hidden_size": HEADS * DIM, "num_layers": 2, "rope_dim_list": [2, 2, 4]}
    model = JoyImageEditPlusTransformer3DModel(in_channels=4, text_dim=CHANNELS, **sizes)
    randomise(model, seed, SHARP)
    pipe = JoyImageEditPlusPipeline(flow(), None, None, None, model, None)

    def encode(prompt: Any, **_: Any) -> Any:
        shown = torch.tensor([TEXT if NOT in text else TEXT - 2 for text in prompt])
        return embedded(prompt, TEXT, CHANNELS).to(dtype), torch.arange(TEXT).lt(shown[:, None])

    pipe.encode_prompt_multiple_images = encode
    inputs = worded(dtype, height=64, width=80)
    return FamilyBench(finished(pipe, dtype), False, 4 * 5, inputs, TEXT)


def oobleck() -> AutoencoderOobleck:
    return AutoencoderOobleck(encoder_hidden_size=4, downsampling_ratios=[2], channel_multiples=[1], decoder_channels=4)


def stable_audio(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """A token of the duration before the audio; one batch, [uncond, cond]."""
    sizes = {"num_attention_heads": HEADS, "num_key_value_attention_heads": 1, "attention_head_dim": DIM, "num_layers": 2}
    text = {"cross_attention_dim": 16, "cross_attention_input_dim": CHANNELS, "global_states_input_dim": 2 * CHANNELS}
    model = StableAudioDiTModel(sample_size=20, in_channels=4, out_channels=4, time_proj_dim=8, **sizes, **text)
    randomise(model, seed, SHARP)
    projection = StableAudioProjectionModel(CHANNELS, CHANNELS, 0, 32)
    randomise(projection, seed + 1)
    pipe = StableAudioPipeline(oobleck(), None, projection, None, model, EDMDPMSolverMultistepScheduler())
    inputs = inputs_of(dtype, "guidance_scale", None)
    return FamilyBench(finished(pipe, dtype), False, 20, inputs, 1, text_first=True, text_seen=1)


class Conditions(ModelMixin, ConfigMixin):
    """Stands in for ACE-Step's encoder of text, lyrics and timbre."""

    @register_to_config
    def __init__(self, channels: int, acoustic: int) -> None:
        super().__init__()
        self.null_condition_emb = torch.nn.Parameter(torch.full((1, 1, channels), -1.0))
        self.register_buffer("silence_latent", torch.zeros(1, 40, acoustic))

    def forward(self, text_hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return text_hidden_states, None


def ace_step(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Audio in patches, two heads of queries for one of keys, every other attention in a window; one batch, [cond, uncond]."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": DIM, "num_hidden_layers": 2, "hidden_size": 24}
    shape = {"in_channels": 12, "audio_acoustic_hidden_dim": 4, "sliding_window": 6, "intermediate_size": 32}
    model = AceStepTransformer1DModel(encoder_hidden_size=CHANNELS, rope_theta=100.0, **shape, **sizes)
    randomise(model, seed, (".self_attn.",))
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)
    pipe = AceStepPipeline(None, None, None, model, Conditions(CHANNELS, 4), scheduler)

    def encode(prompt: Any, **_: Any) -> Any:
        return embedded(prompt, TEXT, CHANNELS).to(dtype), None, None, None

    pipe.encode_prompt = encode
    own = worded(dtype, audio_duration=1.6)

    def inputs(*args: Any, **more: Any) -> dict[str, Any]:
        call = own(*args, **more)
        del call["negative_prompt"]
        return call

    return FamilyBench(finished(pipe, dtype), True, 20, inputs)


def longcat_audio(dtype: torch.dtype = torch.float64, seed: int = 0) -> FamilyBench:
    """Audio beside a text; two calls."""
    sizes = {"dit_heads": HEADS, "dit_dim": HEADS * DIM, "dit_depth": 2, "dit_text_dim": CHANNELS, "latent_dim": 4}
    model = LongCatAudioDiTTransformer(**sizes)
    randomise(model, seed, (".self_attn.",))
    pipe = LongCatAudioDiTPipeline(oobleck(), None, None, model)

    def encode(prompt: Any, _: Any) -> Any:
        lengths = [TEXT if text.startswith(NOT) else TEXT - 2 for text in prompt]
        return embedded(prompt, TEXT, CHANNELS).to(dtype), torch.tensor(lengths)

    pipe.encode_prompt = encode
    pipe.sample_rate, pipe.vae_scale_factor = 10, 1
    inputs = worded(dtype, audio_duration_s=2.0)
    return FamilyBench(finished(pipe, dtype), True, 20, inputs, two_calls=True)


IMAGES: dict[str, Callable[..., FamilyBench]] = {
    "longcat_image": longcat_image,
    "bria_fibo": bria_fibo,
    "ernie_image": ernie_image,
    "krea2": krea2,
    "glm_image": glm_image,
    "hunyuan_image": hunyuan_image,
    "hidream": hidream,
    "lumina_next": lumina_next,
    "fibo2": fibo2,
    "joy_image": joy_image,
    "joy_image_plus": joy_image_plus,
    "stable_audio": stable_audio,
    "ace_step": ace_step,
    "longcat_audio": longcat_audio,
}
