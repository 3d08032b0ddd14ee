"""Fused kernels for the inner loops of published diffusion methods."""

from sdcore import ops
from sdcore.backends import backend
from sdcore.palette import Palette

__version__ = "0.1.0"
__all__ = ["Palette", "__version__", "backend", "ops"]
