"""Triton kernels. Importing a module of this package needs triton, so hfquant does it only where one is used."""
