"""Shards of work with one thread each, and pictures that are stored and not made twice."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm


def own_share(shard: str) -> tuple[int, int]:
    """This process's number, and how many there are; one thread each, so that shards do not fight."""
    torch.set_num_threads(1)
    index, count = map(int, shard.split("/"))
    return index, count


def make_images(folder: Path, starts: range, make: Callable[[int], Tensor]) -> None:
    """Write what `make` gives, (n, 3, H, W) in [0, 1], for each start that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in tqdm(starts, desc=folder.name, mininterval=10):
        path = folder / f"{start:05}.npy"
        if path.exists():
            continue
        temporary = path.with_suffix(".part.npy")
        np.save(temporary, make(start).numpy())
        temporary.rename(path)


def load_images(folder: Path) -> Tensor:
    """All of them, in order."""
    return torch.from_numpy(np.concatenate([np.load(path) for path in sorted(folder.glob("?????.npy"))]))
