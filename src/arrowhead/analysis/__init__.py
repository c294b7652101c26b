"""Measures and draws where a model's attention repeats itself."""
