"""Which models are supported: where their attention, feed-forwards and blocks are, and how their pipelines call them."""
