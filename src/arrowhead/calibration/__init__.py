"""One watched run of a pipeline, which any search can drive step by step."""
