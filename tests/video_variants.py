"""Further pipelines of video families, with small random weights: they start from an image or a video, or follow a video."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.pipelines.ltx2 import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition
from families import cogvideox, hunyuan_video, ltx, skyreels, wan, wan_transformer
from family_bench import HEADS, TEXT, FamilyBench
from PIL import Image
from pipelines import randomise, vae
from video_benches import (
    IMAGE,
    cosmos,
    cosmos_transformer,
    easy_animate,
    hunyuan_vae,
    hunyuan_vae15,
    hunyuan_video15,
    kandinsky5,
    ltx2,
    magvit,
    motif,
    wan_vae,
)

HEIGHT, WIDTH = 64, 48
PHOTO = Image.linear_gradient("L").resize((96, 128)).convert("RGB")


def cogvideox_vae() -> AutoencoderKLCogVideoX:
    down, up = ("CogVideoXDownBlock3D",) * 4, ("CogVideoXUpBlock3D",) * 4
    sizes = {"block_out_channels": (8,) * 4, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
    return AutoencoderKLCogVideoX(down_block_types=down, up_block_types=up, temporal_compression_ratio=4, **sizes)


def ltx_vae() -> AutoencoderKLLTXVideo:
    sizes = {"block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, "latent_channels": 4}
    return AutoencoderKLLTXVideo(layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, **sizes)


def image(height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def video(frames: int = 5) -> torch.Tensor:
    """A video (1, F, C, H, W), as diffusers' video processors take it."""
    return torch.rand(1, frames, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))


def around(
    cls: Any, base: FamilyBench, vae: torch.nn.Module, parts: dict[str, Any], each: bool = False, without: str = "", **more: Any
) -> FamilyBench:
    """The bench of a pipeline around the transformer of `base`, with further arguments of a call.

    `each`: there is one image or video for each prompt. `without`: an argument that this pipeline does not take.
    """
    randomise(vae, 1)
    own, before = base.inputs, base.pipe
    known = {name: getattr(before, name, None) for name in cls._get_signature_keys(cls)[0] if hasattr(before, name)}
    base.pipe = cls(**known | {"vae": vae} | more).to(torch.float64)
    base.pipe.set_progress_bar_config(disable=True)

    def inputs(seed: int = 0, images: int = 1, **others: Any) -> dict[str, Any]:
        given = {name: value.expand(images, *value.shape[1:]) if each else value for name, value in parts.items()}
        call = own(seed, images, **given | others)
        call.pop(without, None)
        return call

    base.inputs = inputs
    return base


def of_wan(cls: Any) -> FamilyBench:
    """Video to video: the last 4 of 5 steps."""
    bench = around(cls, wan(), wan_vae(), {"video": video()}, each=True, without="num_frames")
    own = bench.inputs
    bench.inputs = lambda *args, **more: own(*args, strength=0.8, **more)
    return bench


def of_lucy(cls: Any) -> FamilyBench:
    bench = around(cls, wan(transformer=wan_transformer(0, in_channels=8)), wan_vae(), {"video": video()}, each=True)
    bench.pipe.vae.float()  # the pipeline gives it the video in 32 bits
    return bench


def of_cogvideox(cls: Any, parts: dict[str, Any], extra: int = 4, strength: float | None = None) -> FamilyBench:
    bench = around(cls, cogvideox(in_channels=4 + extra), cogvideox_vae(), parts, each=True)
    own = bench.inputs
    if "image" not in parts:
        bench.inputs = lambda *args, **more: {k: v for k, v in own(*args, **more).items() if k != "num_frames"}
    if strength is not None:
        without = bench.inputs
        bench.inputs = lambda *args, **more: without(*args, **more) | {"strength": strength}
    return bench


def of_hunyuan(cls: Any, **config: Any) -> FamilyBench:
    parts = {"image": image()}
    more = {} if "Skyreels" in cls.__name__ else {"image_processor": None}
    return around(cls, hunyuan_video(**config), hunyuan_vae(), parts, each=True, **more)


def of_ltx(cls: Any, each: bool = True) -> FamilyBench:
    return around(cls, ltx(), ltx_vae(), {"image": image(128, 96)}, each=each)


def image_to_video(cls: Any, base: FamilyBench) -> FamilyBench:
    """The image is in further channels, and its embeddings (B, 5, 16) are attended to beside the text."""
    more = {"image_encoder": None, "image_processor": None}
    bench = around(cls, base, wan_vae(), {"image": image()}, **more)
    embeds = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(2)).double()
    bench.pipe.encode_image = lambda *_: embeds
    bench.text_seen = 0  # cross-attention is no site
    return bench


def of_wan21(cls: Any) -> FamilyBench:
    return image_to_video(cls, wan(transformer=wan_transformer(0, in_channels=12, **TO_IMAGE)))


def of_skyreels(cls: Any) -> FamilyBench:
    return image_to_video(cls, skyreels(in_channels=12, **TO_IMAGE))


def of_hunyuan15(cls: Any) -> FamilyBench:
    """Image to video: the image is in further channels, and its embeddings are attended to beside the text."""
    bench = hunyuan_video15()
    more = {"image_encoder": None, "feature_extractor": None, "guider": bench.pipe.guider}
    picture = Image.linear_gradient("L").resize((48, 64)).convert("RGB")
    around(cls, bench, hunyuan_vae15(), {"image": picture}, **more)
    embeds = torch.randn(1, 2, 10, generator=torch.Generator().manual_seed(2)).double()
    bench.pipe.encode_image = lambda batch_size, **_: embeds.repeat(batch_size, 1, 1)
    own = bench.inputs

    def inputs(*args: Any, **more: Any) -> dict[str, Any]:
        return {name: value for name, value in own(*args, **more).items() if name not in ("height", "width")}

    bench.inputs = inputs
    return bench


def of_easy_animate(cls: Any, parts: dict[str, Any], extra: int) -> FamilyBench:
    bench = around(cls, easy_animate(extra=extra), magvit(), parts, each=True)
    own, encode = bench.inputs, bench.pipe.encode_prompt
    # diffusers 0.42.1 calls it for control videos with an argument that it does not take
    bench.pipe.encode_prompt = lambda text_encoder_index=0, **more: encode(**more)

    def inputs(seed: int = 0, *args: Any, **more: Any) -> dict[str, Any]:
        torch.manual_seed(seed)  # the VAE takes a sample with the global generator
        return own(seed, *args, **more | ({"strength": 0.8} if "video" in parts else {}))

    bench.inputs = inputs
    return bench


def of_cosmos2(cls: Any, parts: dict[str, Any]) -> FamilyBench:
    """A picture, or a video that begins with frames of another one."""
    base, scheduler = cosmos(), FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    base.pipe.transformer = cosmos_transformer(0, in_channels=5 if parts else 4)
    around(cls, base, wan_vae(), parts, each=True, without="" if parts else "num_frames", scheduler=scheduler)
    base.visual = 2 * 4 * 3 if parts else 4 * 3
    return base


class Control(ModelMixin):
    """Stands for Cosmos' ControlNet, which needs torchvision: one tensor for each token of the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, HEADS * 16)

    def forward(self, controls_latents: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any) -> tuple[Any]:
        tokens = torch.nn.functional.avg_pool3d(controls_latents, (1, 2, 2)).flatten(2).transpose(1, 2)  # (B, N, 4)
        return ([self.layer(tokens) * encoder_hidden_states.mean((1, 2), keepdim=True)],)


def of_cosmos_transfer(cls: Any) -> FamilyBench:
    """Two chunks of a video that follows another one by a ControlNet, each with a loop."""
    net = Control()
    randomise(net, 5)
    base = cosmos()
    base.pipe.transformer = cosmos_transformer(0, controlnet_block_every_n=2)
    bench = around(cls, base, wan_vae(), {"controls": video(9)}, each=True, without="num_frames", controlnet=net)
    own, bench.loops = bench.inputs, 2
    bench.inputs = lambda *args, **more: own(*args, num_frames_per_chunk=5, **more)
    return bench


def of_kandinsky5(cls: Any, parts: dict[str, Any], pictures: bool) -> FamilyBench:
    """A video whose first frame is given, or a picture, alone or from another one."""
    own = vae(1, 3) if pictures else hunyuan_vae()
    bench = around(cls, kandinsky5(visual_cond=bool(parts)), own, parts, each=True, without="num_frames" if pictures else "")
    bench.pipe.transformer.time_embeddings.float()
    bench.pipe.resolutions = [(WIDTH, HEIGHT)]
    bench.visual = 4 * 3
    if not pictures:  # the pipeline brings the first four frames to the level of those that follow
        own_inputs, bench.visual = bench.inputs, 5 * 2 * 3
        bench.inputs = lambda *args, **more: own_inputs(*args, **{"height": 32, "num_frames": 17} | more)
    return bench


def of_ltx2(cls: Any, parts: dict[str, Any]) -> FamilyBench:
    """A video whose first frame is given."""
    base = ltx2()
    own, names = base.pipe, cls._get_signature_keys(cls)[0]
    base.pipe = cls(**{name: getattr(own, name, None) for name in names}).to(torch.float64)
    base.pipe.set_progress_bar_config(disable=True)
    before = base.inputs
    base.inputs = lambda *args, **more: before(*args, **parts, **more)
    return base


def of_references(cls: Any, reference: Any) -> FamilyBench:
    """Beside the video drawn, the tokens of a picture that it follows."""
    bench = of_ltx2(cls, {"reference_conditions": reference})
    own, taken = bench.inputs, inspect.signature(cls.__call__).parameters
    bench.inputs = lambda *args, **more: {name: value for name, value in own(*args, **more).items() if name in taken}
    bench.visual += 4 * 3
    return bench


def of_motif(cls: Any) -> FamilyBench:
    """The image is in further channels, and its embeddings are attended to beside the text."""
    bench = around(cls, motif(image_embed_dim=IMAGE[1]), wan_vae(), {"image": image()}, feature_extractor=None)
    own, embeds = bench.inputs, torch.randn(1, *IMAGE, generator=torch.Generator().manual_seed(2)).double()
    object.__setattr__(bench.pipe, "text_encoder", SimpleNamespace(vision_tower=None))
    bench.pipe._get_image_embeds = lambda **_: embeds
    bench.text = bench.text_seen = TEXT + IMAGE[0]
    bench.single = True  # diffusers takes one image and one prompt

    def inputs(seed: int = 0, images: int = 1, **more: Any) -> dict[str, Any]:
        return own(seed, 1, prompt=None, **more)

    bench.inputs = inputs
    return bench


TO_IMAGE = {"image_dim": 16, "added_kv_proj_dim": 16}

VIDEO_VARIANTS: dict[str, tuple[Callable[..., FamilyBench], dict[str, Any]]] = {
    "WanVideoToVideoPipeline": (of_wan, {}),
    "LucyEditPipeline": (of_lucy, {}),
    "CogVideoXImageToVideoPipeline": (of_cogvideox, {"parts": {"image": image()}}),
    "CogVideoXVideoToVideoPipeline": (of_cogvideox, {"parts": {"video": video()}, "extra": 0, "strength": 0.8}),
    "CogVideoXFunControlPipeline": (of_cogvideox, {"parts": {"control_video": video()}}),
    "HunyuanVideoImageToVideoPipeline": (of_hunyuan, {"in_channels": 9, "image_condition_type": "latent_concat"}),
    "HunyuanVideoImageToVideoPipeline, first frame": (of_hunyuan, {"image_condition_type": "token_replace"}),
    "HunyuanSkyreelsImageToVideoPipeline": (of_hunyuan, {"in_channels": 8}),
    "LTXImageToVideoPipeline": (of_ltx, {}),
    "LTXConditionPipeline": (of_ltx, {"each": False}),
    "WanImageToVideoPipeline, 2.1": (of_wan21, {}),
    "SkyReelsV2ImageToVideoPipeline": (of_skyreels, {}),
    "Cosmos2TextToImagePipeline": (of_cosmos2, {"parts": {}}),
    "Cosmos2VideoToWorldPipeline": (of_cosmos2, {"parts": {"image": image()}}),
    "Cosmos2_5_TransferPipeline": (of_cosmos_transfer, {}),
    "Kandinsky5I2VPipeline": (of_kandinsky5, {"parts": {"image": image(32)}, "pictures": False}),
    "Kandinsky5T2IPipeline": (of_kandinsky5, {"parts": {}, "pictures": True}),
    "Kandinsky5I2IPipeline": (of_kandinsky5, {"parts": {"image": image()}, "pictures": True}),
    "LTX2ImageToVideoPipeline": (of_ltx2, {"parts": {"image": image(128, 96), "image_crf": 0}}),
    "LTX2ConditionPipeline": (of_ltx2, {"parts": {"conditions": LTX2VideoCondition(image(128, 96)[0], crf=0)}}),
    "LTX2InContextPipeline": (of_references, {"reference": LTX2ReferenceCondition(PHOTO)}),
    "LTX2HDRPipeline": (of_references, {"reference": LTX2HDRReferenceCondition(PHOTO)}),
    "MotifVideoImage2VideoPipeline": (of_motif, {}),
    "HunyuanVideo15ImageToVideoPipeline": (of_hunyuan15, {}),
    "EasyAnimateControlPipeline": (of_easy_animate, {"parts": {"control_video": video().transpose(1, 2)}, "extra": 8}),
    "EasyAnimateInpaintPipeline": (of_easy_animate, {"parts": {"video": video().transpose(1, 2)}, "extra": 5}),
}
