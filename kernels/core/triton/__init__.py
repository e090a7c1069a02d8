"""Triton kernels of the core, for NVIDIA and AMD GPUs, and what launches them."""
