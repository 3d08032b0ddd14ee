"""Fused kernels for the inner loops of published diffusion methods."""

from sdcore import ops
from sdcore.backends import backend
from sdcore.methods.observe import Observe
from sdcore.palette import Palette
from sdcore.patching import Handle, Method, patch, unpatch

__version__ = "0.1.0"
__all__ = [
    "Handle",
    "Method",
    "Observe",
    "Palette",
    "__version__",
    "backend",
    "ops",
    "patch",
    "unpatch",
]
