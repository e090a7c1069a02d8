"""The compiled and Triton kernels of the core, installed as `hfquant.kernels`."""
