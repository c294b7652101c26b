"""Captions of the emoji, the vocabulary they need, and which pictures are held out of training."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LENGTH = 16
"""Text tokens of every prompt, begin, end and padding included."""
HELD_OUT = 200
STYLES = {"noto": "noto", "twemoji": "twemoji", "fluent3d": "fluent"}


@dataclass(frozen=True)
class Emoji:
    """The data file: pictures (n, 64, 64, 3) uint8, and what each one shows in which style."""

    images: np.ndarray
    styles: tuple[str, ...]
    names: tuple[str, ...]
    tags: tuple[tuple[str, ...], ...]

    @classmethod
    def read(cls, path: Path) -> "Emoji":
        """The file's pictures, in its order."""
        file = np.load(path)
        tags = tuple(tuple(t for t in str(row).split(", ") if t) for row in file["tags"])
        return cls(file["images"], tuple(STYLES[s] for s in file["style"]), tuple(map(str, file["name"])), tags)

    @property
    def held_out(self) -> frozenset[int]:
        """Pictures that are never trained on: one style of a name that has all three, the other two being seen."""
        count = Counter(zip(self.styles, self.names, strict=True))
        whole = sorted(name for name in set(self.names) if all(count[style, name] == 1 for style in STYLES.values()))
        draw = random.Random(0)
        pairs = {(draw.choice(list(STYLES.values())), name) for name in draw.sample(whole, HELD_OUT)}
        return frozenset(i for i, pair in enumerate(zip(self.styles, self.names, strict=True)) if pair in pairs)

    @property
    def seen(self) -> tuple[int, ...]:
        """The pictures of the training set."""
        return tuple(sorted(set(range(len(self.names))) - self.held_out))

    def caption(self, index: int, draw: random.Random | None = None) -> str:
        """As in "a twemoji of a hatching chick"; with `draw`, for training, some of the tags may follow."""
        name = self.names[index]
        article = "" if name.startswith(("flag", "keycap")) else "an " if name[0].lower() in "aeiou" else "a "
        text = f"a {self.styles[index]} of {article}{name}"
        tags = [tag for tag in self.tags[index] if tag not in name]
        if draw is not None and tags and draw.random() < 0.3:
            text += ", " + ", ".join(draw.sample(tags, min(len(tags), draw.randint(1, 3))))
        return text


def tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """The captions' words as tokens."""
    normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Split(Regex(r"[\s,:“”()]+"), "removed")
    found = {word for text in captions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    words = ["<pad>", "<begin>", "<unknown>", "<end>", *sorted(found)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    inner.normalizer, inner.pre_tokenizer = normalizer, splitter
    inner.post_processor = processors.TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[("<begin>", 1), ("<end>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<begin>",
        eos_token="<end>",
        unk_token="<unknown>",
        model_max_length=LENGTH,
    )
