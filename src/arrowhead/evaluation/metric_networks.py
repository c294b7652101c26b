"""The metric networks that a user provides, the measures they make possible, and what is not measured without them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from arrowhead.errors import InputsInvalid
from arrowhead.evaluation import measures
from arrowhead.evaluation.measures import Measure
from arrowhead.evaluation.networks import HOW_TO_GET, NetworkSource
from arrowhead.evaluation.real_images import RealImages
from arrowhead.evaluation.request import Request

NAMES = {"psnr", "ssim", "lpips", "clip", "accuracy", "fid", "kid", "is"}
"""Names of measures, which a reward may not have."""


@dataclass(frozen=True)
class Networks:
    """The metric networks of an evaluation. A measure whose network is None is left out, and the table says how to get it.

    `rewards` are functions of images in [0, 1] and captions, such as HPSv2 or ImageReward, by name. `clip` is a folder.
    `resize` is one of `metrics.resize.MODES`: how images are brought to the inception network's size.
    """

    inception: NetworkSource | None = None
    lpips: NetworkSource | None = None
    clip: str | Path | None = None
    classifier: NetworkSource | None = None
    rewards: Mapping[str, NetworkSource] = field(default_factory=dict)
    resize: str = "tf1"

    def measures(self, device: torch.device, request: Request) -> list[Measure]:
        """Load the networks and return the measures that they and the inputs allow.

        Raises:
            InputsInvalid: a network cannot be loaded, or it needs captions or labels that the inputs do not have.
        """
        if taken := NAMES & {*self.rewards}:
            raise InputsInvalid(f"got rewards named {sorted(taken)}, which are names of other measures; rename them")
        for what, needed, network in (
            ("CLIP score", "prompt", self.clip),
            ("a reward", "prompt", self.rewards),
            ("accuracy", "class_labels", self.classifier),
        ):
            if network and needed not in request.rows:
                raise InputsInvalid(
                    f"{what} needs {needed} among the inputs, got {sorted(request.rows)}; add it, or leave the network out"
                )
        found = [measures.psnr(), measures.ssim()]
        if self.lpips is not None:
            found.append(measures.lpips(self.lpips, device))
        if self.inception is not None:
            found.append(measures.inception(self.inception, self.resize, device))
        if self.clip is not None:
            found.append(measures.clip(self.clip, device))
        if self.classifier is not None:
            found.append(measures.accuracy(self.classifier, device))
        return [*found, *(measures.reward(name, source, device) for name, source in self.rewards.items())]

    def not_measured(self, request: Request, found: list[Measure], real: object) -> dict[str, str]:
        """What the inputs would allow but is not measured, by name, with how to get what is missing."""
        reasons: dict[str, str] = {}
        inception = next((measure for measure in found if measure.features), None)
        if inception is None:
            reasons["FID, KID, IS"] = HOW_TO_GET["inception"]
        else:
            if real is None:
                reasons["FID, KID"] = f"no real images; {HOW_TO_GET['real']}"
            elif not isinstance(real, RealImages):
                reasons["KID"] = "the statistics of the real images have no features; give the images"
            if not inception.logits:
                reasons["IS"] = f"the network gives features only; {HOW_TO_GET['inception']}"
        absent = {"LPIPS": self.lpips is None and "lpips"}
        if "prompt" in request.rows:
            absent["CLIP score"] = self.clip is None and "clip"
            absent["HPSv2"] = "hpsv2" not in self.rewards and "hpsv2"
            absent["ImageReward"] = "image_reward" not in self.rewards and "image_reward"
        if "class_labels" in request.rows:
            absent["accuracy"] = self.classifier is None and "classifier"
        return reasons | {name: HOW_TO_GET[what] for name, what in absent.items() if what}
