"""Which processors are those of an IP-Adapter: after a module's attention they attend once more, to an image prompt."""

from typing import Any

IP_ADAPTERS = {
    "SD3IPAdapterJointAttnProcessor2_0": False,
    "FluxIPAdapterAttnProcessor": True,
    "FluxIPAdapterJointAttnProcessor2_0": True,
}
"""Processors of diffusers, and whether they give what they attend to an image prompt as a third output.

Their first call of attention is the module's, each further one is an adapter's. SD3's adds its output to that of the module.
"""


def has_ip_adapter(module: Any) -> bool:
    """Whether an attention module has an IP-Adapter: its further calls of attention belong to no plan."""
    return _entry(getattr(module, "processor", None)) is not None


def has_third_output(processor: Any) -> bool:
    """Whether a processor is an IP-Adapter's that gives three outputs, each of the last like the image's."""
    return bool(_entry(processor))


def _entry(processor: Any) -> bool | None:
    return next((IP_ADAPTERS[cls.__name__] for cls in type(processor).__mro__ if cls.__name__ in IP_ADAPTERS), None)
