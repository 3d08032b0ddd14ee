"""Triton kernels and their launchers, one file per op. Installed as ``sdcore.triton_kernels``."""
