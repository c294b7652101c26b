"""Where attention sits in each family of models. Says where, never what."""

from arrowhead.models.find import Model, find

__all__ = ["Model", "find"]
