"""The families table's part for further image models, see `families`. Data alone."""

from arrowhead.models.family import NONE, Family
from arrowhead.models.guidance import ace_step_guidance, cfg_interval, guidance_above_one, guidance_above_zero
from arrowhead.models.guiders import guided_by_guider, guider_interval, scale_of_guider, unsupported_guider
from arrowhead.models.token_layouts import (
    audio_with_text,
    gist_and_image,
    image_only,
    image_then_padded_text,
    image_then_t5_and_llama,
    image_tokens_by_positions,
    items_then_text,
    last_item,
    packed_items_then_text,
    patched_with_two_texts,
    seconds_then_audio,
    text_then_image,
    text_then_packed_image,
    tokens_of_first_item,
)

IMAGE_FAMILIES: tuple[Family, ...] = (
    Family(
        name="LongCat-Image",
        transformer="LongCatImageTransformer2DModel",
        site_pattern=r"(single_)?transformer_blocks\.\d+\.attn",
        joint_pattern=r"(single_)?transformer_blocks\.\d+\.attn",
        branch_order={"LongCatImagePipeline": "two_calls", "LongCatImageEditPipeline": "two_calls"},
        tokens=text_then_packed_image,
        guided=guidance_above_one,
        output_tokens=image_tokens_by_positions,
        left_alone="the text's own feed-forwards (except in whole blocks), embeddings",
    ),
    Family(
        name="Bria FIBO",  # every block is given another layer's text
        transformer="BriaFiboTransformer2DModel",
        site_pattern=r"(single_)?transformer_blocks\.\d+\.attn",
        joint_pattern=r"(single_)?transformer_blocks\.\d+\.attn",
        branch_order={"BriaFiboPipeline": "uncond_first", "BriaFiboEditPipeline": "uncond_first"},
        tokens=text_then_packed_image,
        guided=guidance_above_one,
        output_tokens=image_tokens_by_positions,
        left_alone="the text's own feed-forwards (except in whole blocks), embeddings",
    ),
    Family(
        name="ERNIE-Image",  # between attentions the tokens come before the samples, (N, B, C)
        transformer="ErnieImageTransformer2DModel",
        site_pattern=r"layers\.\d+\.self_attention",
        joint_pattern=r"layers\.\d+\.self_attention",
        feed_forward_pattern=NONE,
        block_pattern=NONE,
        branch_order={"ErnieImagePipeline": "uncond_first"},
        tokens=image_then_padded_text,
        guided=guidance_above_one,
        left_alone="feed-forwards, whole blocks, embeddings, output layer",
    ),
    Family(
        name="Krea 2",  # several heads of queries share keys and values, and a gate multiplies what heads give
        transformer="Krea2Transformer2DModel",
        site_pattern=r"transformer_blocks\.\d+\.attn",
        joint_pattern=r"transformer_blocks\.\d+\.(attn|ff)",
        block_pattern=r"transformer_blocks\.\d+",
        branch_order={"Krea2Pipeline": "two_calls"},
        tokens=text_then_packed_image,
        guided=guidance_above_zero,
        guidance_scale=lambda call: 1 + float(call["guidance_scale"]),
        left_alone="the text's fusion of layers, embeddings, output layer",
    ),
    Family(
        name="GLM-Image",  # its blocks return the image before the text, and a feed-forward runs once for each
        transformer="GlmImageTransformer2DModel",
        site_pattern=r"transformer_blocks\.\d+\.attn1",
        joint_pattern=r"transformer_blocks\.\d+\.attn1",
        feed_forward_pattern=NONE,
        block_pattern=NONE,
        branch_order={"GlmImagePipeline": "two_calls"},
        tokens=text_then_image,
        guided=guidance_above_one,
        unsupported_call=lambda call: (
            "images to edit, whose keys and values the conditional call attends to" if call["image"] is not None else None
        ),
        left_alone="feed-forwards, whole blocks, embeddings, output layer",
    ),
    Family(
        name="HunyuanImage 2.1",  # its blocks return the image before the text
        transformer="HunyuanImageTransformer2DModel",
        site_pattern=r"(single_)?transformer_blocks\.\d+\.attn",
        joint_pattern=r"(single_)?transformer_blocks\.\d+\.attn",
        block_pattern=NONE,
        branch_order={"HunyuanImagePipeline": "two_calls", "HunyuanImageRefinerPipeline": "two_calls"},
        tokens=patched_with_two_texts,
        guided=guided_by_guider,
        guidance_scale=scale_of_guider,
        guidance_changes=guider_interval,
        unsupported_call=unsupported_guider,
        left_alone="the text's refiner and feed-forwards, whole blocks, layers of single-stream blocks besides attention",
    ),
    Family(
        name="HiDream-I1",  # norms across heads; feed-forwards of several experts, of which each token takes some
        transformer="HiDreamImageTransformer2DModel",
        site_pattern=r"(double|single)_stream_blocks\.\d+\.block\.attn1",
        joint_pattern=r"(double|single)_stream_blocks\.\d+\.block\.attn1",
        feed_forward_pattern=NONE,
        block_pattern=NONE,
        separable_heads=False,
        branch_order={"HiDreamImagePipeline": "uncond_first"},
        tokens=image_then_t5_and_llama,
        guided=guidance_above_one,
        left_alone="feed-forwards, whole blocks, embeddings, output layer",
    ),
    Family(
        name="Lumina-Next",  # both attentions of a block have one output projection, outside of them
        transformer="LuminaNextDiT2DModel",
        site_pattern=r"layers\.\d+\.attn1",
        feed_forward_pattern=r"layers\.\d+\.feed_forward",
        block_pattern=NONE,
        branch_order={"LuminaPipeline": "cond_first"},
        tokens=image_only,
        guided=guidance_above_one,
        latent_channels=lambda transformer: int(transformer.config.in_channels),
        left_alone="cross-attention and the output projection, whole blocks, embeddings, output layer",
    ),
    Family(
        name="FIBO 2",  # some blocks attend to the text encoder as well
        transformer="BriaFibo2Transformer2DModel",
        site_pattern=r"layers\.\d+\.attention",
        joint_pattern=r"layers\.\d+\.(attention|feed_forward)",
        feed_forward_pattern=r"layers\.\d+\.feed_forward",
        block_pattern=NONE,
        branch_order={"BriaFibo2Pipeline": "two_calls"},
        tokens=gist_and_image,
        guided=guidance_above_one,
        left_alone="cross-attention, the image's refiner and the text's resampler, whole blocks, embeddings, output layer",
    ),
    Family(
        name="JoyImage Edit",  # its blocks return the image before the text
        transformer="JoyImageEditTransformer3DModel",
        site_pattern=r"double_blocks\.\d+\.attn",
        joint_pattern=r"double_blocks\.\d+\.attn",
        feed_forward_pattern=r"double_blocks\.\d+\.img_mlp",
        block_pattern=NONE,
        branch_order={"JoyImageEditPipeline": "two_calls"},
        tokens=items_then_text,
        guided=guidance_above_one,
        output_tokens=last_item,
        left_alone="the text's feed-forwards, whole blocks, embeddings, output layer",
    ),
    Family(
        name="JoyImage Edit Plus",
        transformer="JoyImageEditPlusTransformer3DModel",
        site_pattern=r"double_blocks\.\d+\.attn",
        joint_pattern=r"double_blocks\.\d+\.attn",
        feed_forward_pattern=r"double_blocks\.\d+\.img_mlp",
        block_pattern=NONE,
        branch_order={"JoyImageEditPlusPipeline": "uncond_first"},
        tokens=packed_items_then_text,
        guided=guidance_above_one,
        output_tokens=tokens_of_first_item,
        left_alone="the text's feed-forwards, whole blocks, embeddings, output layer",
    ),
    Family(
        name="Stable Audio Open",  # a token of the duration comes before those of the audio
        transformer="StableAudioDiTModel",
        site_pattern=r"transformer_blocks\.\d+\.attn1",
        joint_pattern=r"transformer_blocks\.\d+\.(attn1|ff)",
        block_pattern=NONE,
        branch_order={"StableAudioPipeline": "uncond_first"},
        tokens=seconds_then_audio,
        guided=guidance_above_one,
        left_alone="cross-attention, whole blocks, embeddings, output layer",
    ),
    Family(
        name="ACE-Step 1.5",  # several heads of queries share keys and values; every other attention has a window of its own
        transformer="AceStepTransformer1DModel",
        site_pattern=r"layers\.\d+\.self_attn",
        cross_pattern=r"layers\.\d+\.cross_attn",
        feed_forward_pattern=r"layers\.\d+\.mlp",
        block_pattern=r"layers\.\d+",
        branch_order={"AceStepPipeline": "cond_first"},
        tokens=audio_with_text,
        guided=ace_step_guidance,
        guidance_changes=cfg_interval,
        unsupported_call=lambda call: (
            f"audio_cover_strength={call['audio_cover_strength']}, which calls the transformer once more in each step"
            if call["audio_cover_strength"] < 1
            else None
        ),
        left_alone="condition encoder, embeddings, output layer",
    ),
    Family(
        name="LongCat-AudioDiT",  # norms across heads
        transformer="LongCatAudioDiTTransformer",
        site_pattern=r"blocks\.\d+\.self_attn",
        cross_pattern=r"blocks\.\d+\.cross_attn",
        feed_forward_pattern=r"blocks\.\d+\.ffn",
        block_pattern=r"blocks\.\d+",
        per_sample_pattern=r"adaln_mlp.*",
        separable_heads=False,
        branch_order={"LongCatAudioDiTPipeline": "two_calls"},
        tokens=audio_with_text,
        guided=guidance_above_one,
        left_alone="embeddings, output layer",
    ),
)
