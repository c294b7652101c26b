"""Searches for plans: DiTFastAttn's greedy one, DiTFastAttnV2's head by head, and a budget for the whole generation."""
