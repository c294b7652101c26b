"""Where attention sits in each family of models. Says where, never what."""

from arrowhead.models.adapter import Adapter, Attention, FusedQKV, Own, described, generating
from arrowhead.models.beside import require_whole
from arrowhead.models.find import ATTENTION, EVERYTHING, Model, find, transformers_of
from arrowhead.models.latte import latte
from arrowhead.models.open_sora import open_sora
from arrowhead.models.supported import Supported, supported

__all__ = [
    "ATTENTION",
    "EVERYTHING",
    "Adapter",
    "Attention",
    "FusedQKV",
    "Model",
    "Own",
    "Supported",
    "described",
    "find",
    "generating",
    "latte",
    "open_sora",
    "require_whole",
    "supported",
    "transformers_of",
]
