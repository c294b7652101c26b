"""Kernels in plain PyTorch, for any device and fast on a CPU."""
