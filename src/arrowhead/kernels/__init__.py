"""Attention of heads under their policies, by several kernels that agree with one reference."""
