"""What a result was made with."""

from importlib.metadata import version


def versions() -> dict[str, str]:
    """Versions of the libraries that decide a result."""
    return {name: version(name) for name in ("arrowhead", "diffusers", "torch")}
