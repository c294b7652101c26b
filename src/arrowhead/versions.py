"""The versions of the libraries that a result was made with."""

from importlib.metadata import version


def versions() -> dict[str, str]:
    """The versions of arrowhead, diffusers and torch, by name."""
    return {name: version(name) for name in ("arrowhead", "diffusers", "torch")}
