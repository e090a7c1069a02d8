"""The parts of `gpu_check`: what is checked and measured on a GPU, one question a module."""
