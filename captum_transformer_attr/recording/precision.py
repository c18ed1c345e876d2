"""Half-precision models are followed in float32.

Relevance divides by activations and the identity term of a rollout is subtracted from scores thousands of times
smaller: in float16 or bfloat16 little but rounding would be left. Live tensors are float32 from the inputs on; a
half-precision constant (a weight, a mask) is converted when a live tensor meets it, and a conversion back to half
precision becomes one to float32. The model itself keeps its dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
CONVERSIONS = ("half", "bfloat16")


def is_half(dtype: torch.dtype) -> bool:
    """Whether this dtype is followed in float32."""
    return dtype in HALVES


def promoted(value: Any) -> Any:
    """Arguments of a torch function with half-precision constants and dtypes replaced by float32 ones."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALVES and not value.requires_grad else value
    if isinstance(value, torch.dtype):
        return torch.float32 if value in HALVES else value
    if isinstance(value, tuple):
        items = [promoted(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [promoted(v) for v in value]
    if isinstance(value, dict):
        return {k: promoted(v) for k, v in value.items()}
    return value
