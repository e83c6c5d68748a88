"""Kernels written for GPUs, and what decides whether they can run; the rest of `cvft` is plain PyTorch."""
