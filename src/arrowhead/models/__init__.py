"""Where attention sits in each family of models. Says where, never what."""

from arrowhead.models.find import ATTENTION, EVERYTHING, Model, find, transformers_of
from arrowhead.models.supported import Supported, supported

__all__ = ["ATTENTION", "EVERYTHING", "Model", "Supported", "find", "supported", "transformers_of"]
