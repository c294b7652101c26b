"""The families table's part for videos, see `families`. Data alone."""

from arrowhead.models.family import NONE, Family
from arrowhead.models.guidance import (
    first_step_below_boundary,
    guidance_above_one,
    guidance_by_more_calls,
    second_or_first_scale,
    true_cfg,
    video_or_audio_guidance,
)
from arrowhead.models.guiders import guided_by_guider, guider_interval, scale_of_guider, unsupported_guider
from arrowhead.models.unsupported import causal_blocks, sparse_attention, temporal_reasoning, text_in_video_layers
from arrowhead.models.video_tokens import (
    frames_with_text,
    packed_video_with_text,
    text_then_video,
    texts_then_video,
    video_by_frames,
    video_of_last_channels_with_text,
    video_then_text,
    video_then_texts,
    video_with_text,
)

VIDEO_FAMILIES: tuple[Family, ...] = (
    Family(
        name="Wan 2.1, 2.2",
        transformer="WanTransformer3DModel",
        site_pattern=r"blocks\.\d+\.attn1",
        cross_pattern=r"blocks\.\d+\.attn2",
        feed_forward_pattern=r"blocks\.\d+\.ffn",
        block_pattern=r"blocks\.\d+",
        branch_order=dict.fromkeys(
            ["WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline", "LucyEditPipeline"], "two_calls"
        ),
        tokens=video_with_text,
        guided=guidance_above_one,
        second_from=first_step_below_boundary,
        second_guidance_scale=second_or_first_scale,
        left_alone="caption projection, step embeddings, output layer; attention to an image, and whole blocks with it",
    ),
    Family(
        name="HunyuanVideo",  # its blocks return the video before the text
        transformer="HunyuanVideoTransformer3DModel",
        site_pattern=r"(single_)?transformer_blocks\.\d+\.attn",
        joint_pattern=r"(single_)?transformer_blocks\.\d+\.attn",
        block_pattern=NONE,
        branch_order=dict.fromkeys(
            ["HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"], "two_calls"
        ),
        tokens=video_then_text,
        guided=true_cfg,
        guidance_scale=lambda call: float(call["true_cfg_scale"]),
        left_alone="the text's refiner and feed-forwards, whole blocks, layers of single-stream blocks besides attention",
    ),
    Family(
        name="LTX-Video",
        transformer="LTXVideoTransformer3DModel",
        site_pattern=r"transformer_blocks\.\d+\.attn1",
        cross_pattern=r"transformer_blocks\.\d+\.attn2",
        branch_order=dict.fromkeys(["LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"], "uncond_first"),
        tokens=packed_video_with_text,
        guided=guidance_above_one,
        left_alone="caption projection, step embeddings, output layer",
    ),
    Family(
        name="CogVideoX",  # its blocks return the video before the text
        transformer="CogVideoXTransformer3DModel",
        site_pattern=r"transformer_blocks\.\d+\.attn1",
        joint_pattern=r"transformer_blocks\.\d+\.(attn1|ff)",
        block_pattern=NONE,
        branch_order=dict.fromkeys(
            [
                "CogVideoXPipeline",
                "CogVideoXImageToVideoPipeline",
                "CogVideoXVideoToVideoPipeline",
                "CogVideoXFunControlPipeline",
            ],
            "uncond_first",
        ),
        tokens=text_then_video,
        guided=guidance_above_one,
        left_alone="whole blocks, embeddings, output layer",
    ),
    Family(
        name="Allegro",
        transformer="AllegroTransformer3DModel",
        site_pattern=r"transformer_blocks\.\d+\.attn1",
        cross_pattern=r"transformer_blocks\.\d+\.attn2",
        branch_order={"AllegroPipeline": "uncond_first"},
        tokens=video_then_text,
        guided=guidance_above_one,
        left_alone="caption projection, step embeddings, output layer",
    ),
    Family(
        name="Latte",  # the same kind of sites as those that DiTFastAttn compresses in OpenSora
        transformer="LatteTransformer3DModel",
        site_pattern=r"transformer_blocks\.\d+\.attn1",
        feed_forward_pattern=NONE,
        block_pattern=NONE,
        over="space",
        branch_order={"LattePipeline": "uncond_first"},
        tokens=video_by_frames,
        guided=guidance_above_one,
        left_alone="temporal blocks, cross-attention and feed-forwards, whole blocks, embeddings, output layer",
    ),
    Family(
        name="Mochi",  # its rotary embeddings rotate every head by other angles
        transformer="MochiTransformer3DModel",
        site_pattern=r"transformer_blocks\.\d+\.attn1",
        joint_pattern=r"transformer_blocks\.\d+\.attn1",
        block_pattern=NONE,
        by_sample=True,
        separable_heads=False,
        branch_order={"MochiPipeline": "uncond_first"},
        tokens=video_then_text,
        guided=guidance_above_one,
        left_alone="the text's feed-forwards, whole blocks, embeddings, output layer",
    ),
    Family(
        name="SkyReels V2",
        transformer="SkyReelsV2Transformer3DModel",
        site_pattern=r"blocks\.\d+\.attn1",
        cross_pattern=r"blocks\.\d+\.attn2",
        feed_forward_pattern=r"blocks\.\d+\.ffn",
        block_pattern=r"blocks\.\d+",
        branch_order={"SkyReelsV2Pipeline": "two_calls", "SkyReelsV2ImageToVideoPipeline": "two_calls"},
        tokens=video_with_text,
        guided=guidance_above_one,
        unsupported_transformer=causal_blocks,
        left_alone="caption projection, step embeddings, output layer; attention to an image, and whole blocks with it",
    ),
    Family(
        name="Wan VACE",  # its VACE blocks give the main blocks what to follow
        transformer="WanVACETransformer3DModel",
        site_pattern=r"blocks\.\d+\.attn1",
        cross_pattern=r"blocks\.\d+\.attn2",
        feed_forward_pattern=r"blocks\.\d+\.ffn",
        block_pattern=r"blocks\.\d+",
        branch_order={"WanVACEPipeline": "two_calls"},
        tokens=video_with_text,
        guided=guidance_above_one,
        second_from=first_step_below_boundary,
        second_guidance_scale=second_or_first_scale,
        left_alone="VACE blocks, caption projection, step embeddings, output layer",
    ),
    Family(
        name="HunyuanVideo 1.5",  # its blocks return the video before the text
        transformer="HunyuanVideo15Transformer3DModel",
        site_pattern=r"transformer_blocks\.\d+\.attn",
        joint_pattern=r"transformer_blocks\.\d+\.attn",
        block_pattern=NONE,
        branch_order=dict.fromkeys(["HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"], "two_calls"),
        tokens=video_then_texts,
        guided=guided_by_guider,
        guidance_scale=scale_of_guider,
        unsupported_call=unsupported_guider,
        guidance_changes=guider_interval,
        left_alone="the text's refiner and feed-forwards, whole blocks, embeddings, output layer",
    ),
    Family(
        name="EasyAnimate",  # its blocks return the video before the text
        transformer="EasyAnimateTransformer3DModel",
        site_pattern=r"transformer_blocks\.\d+\.attn1",
        joint_pattern=r"transformer_blocks\.\d+\.attn1",
        block_pattern=NONE,
        branch_order=dict.fromkeys(
            ["EasyAnimatePipeline", "EasyAnimateControlPipeline", "EasyAnimateInpaintPipeline"], "uncond_first"
        ),
        tokens=texts_then_video,
        guided=guidance_above_one,
        unsupported_transformer=text_in_video_layers,
        left_alone="the text's feed-forwards, whole blocks, embeddings, output layer",
    ),
    Family(
        name="ChronoEdit",
        transformer="ChronoEditTransformer3DModel",
        site_pattern=r"blocks\.\d+\.attn1",
        feed_forward_pattern=r"blocks\.\d+\.ffn",
        block_pattern=NONE,
        branch_order={"ChronoEditPipeline": "two_calls"},
        tokens=video_with_text,
        guided=guidance_above_one,
        unsupported_call=temporal_reasoning,
        left_alone="cross-attention, which sees an image besides the text, whole blocks, embeddings, output layer",
    ),
    Family(
        name="AnyFlow",
        transformer="AnyFlowTransformer3DModel",
        site_pattern=r"blocks\.\d+\.attn1",
        cross_pattern=r"blocks\.\d+\.attn2",
        feed_forward_pattern=r"blocks\.\d+\.ffn",
        block_pattern=r"blocks\.\d+",
        branch_order={"AnyFlowPipeline": "uncond_first"},
        tokens=frames_with_text,
        guided=guidance_above_one,
        left_alone="caption projection, step embeddings, output layer",
    ),
    Family(
        name="Cosmos 2, 2.5",  # where each frame has a timestep, its norms' layers run once for each token
        transformer="CosmosTransformer3DModel",
        site_pattern=r"transformer_blocks\.\d+\.attn1",
        cross_pattern=r"transformer_blocks\.\d+\.attn2",
        block_pattern=NONE,
        branch_order=dict.fromkeys(
            ["Cosmos2_5_PredictBasePipeline", "Cosmos2TextToImagePipeline", "Cosmos2VideoToWorldPipeline"], "two_calls"
        ),
        tokens=video_with_text,
        guided=guidance_above_one,
        guidance_scale=lambda call: 1 + float(call["guidance_scale"]),
        left_alone="whole blocks, text projection, embeddings, output layer",
    ),
    Family(
        name="Kandinsky 5",
        transformer="Kandinsky5Transformer3DModel",
        site_pattern=r"visual_transformer_blocks\.\d+\.self_attention",
        cross_pattern=r"visual_transformer_blocks\.\d+\.cross_attention",
        feed_forward_pattern=r"visual_transformer_blocks\.\d+\.feed_forward",
        block_pattern=r"visual_transformer_blocks\.\d+",
        per_sample_pattern=r"visual_modulation.*",
        branch_order=dict.fromkeys(
            ["Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline", "Kandinsky5T2IPipeline", "Kandinsky5I2IPipeline"], "two_calls"
        ),
        tokens=video_of_last_channels_with_text,
        guided=guidance_above_one,
        unsupported_transformer=sparse_attention,
        latent_channels=lambda _: None,
        left_alone="the text's blocks, embeddings, output layer",
    ),
    Family(
        name="LTX-2",  # its blocks return video and audio
        transformer="LTX2VideoTransformer3DModel",
        site_pattern=r"transformer_blocks\.\d+\.attn1",
        cross_pattern=r"transformer_blocks\.\d+\.attn2",
        block_pattern=NONE,
        branch_order=dict.fromkeys(["LTX2Pipeline", "LTX2ImageToVideoPipeline", "LTX2ConditionPipeline"], "uncond_first"),
        tokens=packed_video_with_text,
        guided=video_or_audio_guidance,
        guidance_changes=guidance_by_more_calls,
        beside=lambda call: call["isolate_modalities"] or bool(call["spatio_temporal_guidance_blocks"]),
        left_alone="audio, attention between video and audio, whole blocks, caption projection, embeddings, output layer",
    ),
)
