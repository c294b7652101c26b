"""Search for a plan, apply it, print what was done, remove it: on the bundled model, offline, in half a minute.

For another pipeline replace the first two statements, e.g. by a PixArtSigmaPipeline and `{"prompt": [...]}`.
"""

from pathlib import Path

import torch

import arrowhead as ah

pipe = ah.tiny.load("dit")
inputs = {"class_labels": [0, 8], "num_inference_steps": 10}

plan = ah.search(pipe, inputs | {"generator": torch.Generator().manual_seed(0)}, threshold="D4")
with ah.applied(pipe, plan) as run:
    images = pipe(**inputs, generator=torch.Generator().manual_seed(1)).images
print(run.summary())

out = Path("demo")
out.mkdir(exist_ok=True)
plan.save(out / "quickstart.json")
images[0].save(out / "quickstart.png")
