"""Stabilised quotients, which all rules divide by."""

from __future__ import annotations

import torch
from torch import Tensor

STABILISER = 1e-9  # the published one, added whatever the sign of the denominator
# float64 divides by smaller numbers than this as they are: beside them the stabiliser would take relevance away.
RESOLVED = 1e-6
NOTHING = {
    torch.float64: 1e-150,
    torch.float32: 1e-36,
}  # what is smaller is treated as 0: a quotient by it would overflow


def stabilised(b: Tensor) -> Tensor:
    """``b`` plus the published stabiliser, in float64 only where ``b`` is large beside it."""
    if b.dtype != torch.float64:
        return b + STABILISER
    return torch.where(b.abs() < RESOLVED, b, b + STABILISER)


def is_nothing(b: Tensor) -> Tensor:
    """Where ``b`` is 0, or so near to it (an attention that underflows) that a quotient would overflow."""
    return b.abs() < NOTHING[b.dtype] if b.dtype in NOTHING else b == 0


def divide(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, stabilised, 0 where b is nothing."""
    return torch.where(is_nothing(b), 0, a / stabilised(b))
