"""The search that spends one budget over the whole generation, where it costs the least quality."""
