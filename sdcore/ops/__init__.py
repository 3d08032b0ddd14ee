"""The ops: public functions over flat ops registered with PyTorch."""

from sdcore.ops.random_rotations import random_rotations
from sdcore.ops.sliced_wasserstein import sliced_wasserstein

__all__ = ["random_rotations", "sliced_wasserstein"]
