"""The loss of SW-Guidance (Lobashev, Larchenko, Guskov, 2025) as its published code computes it.

One one-dimensional problem at a time: both sets projected, a bootstrap of the smaller set's size
drawn with replacement on the host, the same indices for both, and two sorts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bootstrap(x: Tensor, y: Tensor) -> Tensor:
    """Indices into both sets, drawn on the host and copied to the device of x."""
    fewer = min(len(x), len(y))
    return torch.randint(0, fewer, (fewer,)).to(x.device)


def loss(x: Tensor, y: Tensor, directions: Tensor, drawn: Tensor | None = None) -> Tensor:
    """Mean over directions [L, d] of W_1 between projections of x [n, d] and y [m, d].

    ``drawn``: what host_part returned, in the place of indices drawn in the call.
    """
    directions = directions.to(x.dtype)
    total = x.new_zeros(())
    for number, direction in enumerate(directions):
        chosen = bootstrap(x, y) if drawn is None else drawn[number]
        px, py = (x @ direction)[chosen], (y @ direction)[chosen]
        total = total + (px.sort().values - py.sort().values).abs().mean()
    return total / len(directions)


def host_part(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """What of the loss the host does: drawing the indices and copying them, [L, min(n, m)]."""
    drawn = torch.empty(len(directions), min(len(x), len(y)), dtype=torch.int64, device=x.device)
    for row in drawn:
        row.copy_(bootstrap(x, y))
    return drawn
