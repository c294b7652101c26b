"""The networks that an evaluation is given, the measures that they make possible, and what is left out without them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from arrowhead.errors import InputsInvalid
from arrowhead.evaluation import measures
from arrowhead.evaluation.measures import Measure
from arrowhead.evaluation.networks import GET, Given
from arrowhead.evaluation.real_images import Pictures
from arrowhead.evaluation.request import Request

NAMES = {"psnr", "ssim", "lpips", "clip", "accuracy", "fid", "kid", "is"}


@dataclass(frozen=True)
class Networks:
    """Other people's networks, see `networks.Given`; what is None is not measured, and the table says how to get it.

    `rewards` are HPSv2, ImageReward and the like by name: functions of images in [0, 1] and captions. `resize` is how images
    come to the inception network's size.
    """

    inception: Given | None = None
    lpips: Given | None = None
    clip: str | Path | None = None
    classifier: Given | None = None
    rewards: Mapping[str, Given] = field(default_factory=dict)
    resize: str = "tf1"

    def measures(self, device: torch.device, asked: Request) -> list[Measure]:
        """What can be measured, its networks loaded.

        Raises:
            InputsInvalid: a network cannot be loaded, or there are no captions or labels to measure by.
        """
        if taken := NAMES & {*self.rewards}:
            raise InputsInvalid(f"got rewards named {sorted(taken)}, which are names of other measures; name them otherwise")
        for what, needed, given in (
            ("CLIP score", "prompt", self.clip),
            ("a reward", "prompt", self.rewards),
            ("accuracy", "class_labels", self.classifier),
        ):
            if given and needed not in asked.rows:
                raise InputsInvalid(
                    f"{what} needs {needed} among the inputs, got {sorted(asked.rows)}; add it, or leave the network out"
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
        return [*found, *(measures.reward(name, given, device) for name, given in self.rewards.items())]

    def left_out(self, asked: Request, found: list[Measure], real: object) -> dict[str, str]:
        """What is not measured, and how to have it; of what the inputs would allow."""
        said: dict[str, str] = {}
        inception = next((measure for measure in found if measure.features), None)
        if inception is None:
            said["FID, KID, IS"] = GET["inception"]
        else:
            if real is None:
                said["FID, KID"] = f"no real images; {GET['real']}"
            elif not isinstance(real, Pictures):
                said["KID"] = "the real images' statistics have no features; give the images"
            if not inception.logits:
                said["IS"] = f"the network gives features alone; {GET['inception']}"
        absent = {"LPIPS": self.lpips is None and "lpips"}
        if "prompt" in asked.rows:
            absent["CLIP score"] = self.clip is None and "clip"
            absent["HPSv2"] = "hpsv2" not in self.rewards and "hpsv2"
            absent["ImageReward"] = "image_reward" not in self.rewards and "image_reward"
        if "class_labels" in asked.rows:
            absent["accuracy"] = self.classifier is None and "classifier"
        return said | {name: GET[what] for name, what in absent.items() if what}
