"""Where attention sits in each family of models. Says where, never what."""

from arrowhead.models.find import ATTENTION, EVERYTHING, Model, find

__all__ = ["ATTENTION", "EVERYTHING", "Model", "find"]
