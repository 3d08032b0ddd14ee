"""The ops: public functions over flat ops registered with PyTorch."""

from sdcore.ops.clean_latents import clean_latents
from sdcore.ops.control_step import control_step
from sdcore.ops.delta_combine import delta_combine
from sdcore.ops.geglu import geglu
from sdcore.ops.group_norm_silu import group_norm_silu
from sdcore.ops.masked_cross_attention import masked_cross_attention
from sdcore.ops.random_rotations import random_rotations
from sdcore.ops.sliced_wasserstein import sliced_wasserstein
from sdcore.ops.wide_attention import wide_attention

__all__ = [
    "clean_latents",
    "control_step",
    "delta_combine",
    "geglu",
    "group_norm_silu",
    "masked_cross_attention",
    "random_rotations",
    "sliced_wasserstein",
    "wide_attention",
]
