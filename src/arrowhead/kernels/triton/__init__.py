"""The fused kernel for GPUs, in Triton: one launch in which every head follows its own policy."""
