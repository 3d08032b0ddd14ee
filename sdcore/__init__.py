"""Fused kernels for the inner loops of published diffusion methods."""

from sdcore import ops
from sdcore.backends import backend
from sdcore.methods.color_guidance import ColorGuidance
from sdcore.methods.delta_sampling import Control, DeltaSampling
from sdcore.methods.fast_decoder import FastDecoder
from sdcore.methods.fast_geglu import FastGEGLU
from sdcore.methods.fast_norms import FastNorms
from sdcore.methods.gated_attention import GatedAttention
from sdcore.methods.lora import LoRA
from sdcore.methods.observe import Observe
from sdcore.methods.region_attention import Region, RegionAttention
from sdcore.palette import Palette
from sdcore.patching import Handle, Method, patch, unpatch

__version__ = "0.1.0"
__all__ = [
    "ColorGuidance",
    "Control",
    "DeltaSampling",
    "FastDecoder",
    "FastGEGLU",
    "FastNorms",
    "GatedAttention",
    "Handle",
    "LoRA",
    "Method",
    "Observe",
    "Palette",
    "Region",
    "RegionAttention",
    "__version__",
    "backend",
    "ops",
    "patch",
    "unpatch",
]
