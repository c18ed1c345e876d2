"""Does the relevance add up to what was explained?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.metrics._inputs import (
    Forward,
    Inputs,
    Target,
    checked,
    class_scores,
    class_targets,
    first_tensor,
    per_example,
    target_scores,
)


def completeness(
    forward: Forward | None,
    inputs: Inputs,
    attributions: Any,
    target: Target | None = None,
    *,
    total: float | Tensor | None = None,
    elsewhere: float | Tensor = 0.0,
    relative: bool = False,
) -> Tensor:
    """What the attributions leave unexplained: the explained output minus their sum, per example.

    The axiom of Sundararajan, Taly and Yan (ICML 2017) and the conservation of layer-wise relevance propagation (Bach
    et al. 2015); the sign is that of Captum's convergence delta for LRP.

    Args:
        forward: model or function to (N, classes); not called if `total` is given.
        inputs: what was explained.
        attributions: tensor, tuple or mapping, one entry for every explained input.
        target: the explained class.
        total: what should be distributed, if not the target's score: 1 for methods that start from a one-hot vector
            (CVPR 2021), the difference to the baseline's output for integrated gradients. A number or (N,).
        elsewhere: relevance that legitimately arrived elsewhere (biases, positional embeddings), a number or (N,).
        relative: divide by the absolute total; NaN where that is zero.

    Returns:
        (N,) float64, zero for a complete attribution.
    """
    if isinstance(attributions, Mapping):
        given = list(attributions.values())
    else:
        given = list(attributions) if isinstance(attributions, (tuple, list)) else [attributions]
    parts = [checked(part) for part in given]
    count = len(first_tensor(inputs))
    if not parts or any(part.ndim == 0 or len(part) != count for part in parts):
        raise InputError(f"attributions must be given for each of the {count} examples")
    device = parts[0].device
    if total is None:
        if forward is None or target is None:
            raise InputError("give forward and target, or the total that the attributions should add up to")
        scores = class_scores(forward, inputs, count)
        chosen = class_targets(target, count, scores.device)
        total = target_scores(scores, chosen)
    explained = per_example(total, "total", count, device)
    arrived = sum((part.double().unsqueeze(-1).flatten(1).sum(1) for part in parts), torch.zeros(count, device=device))
    gap = explained - arrived - per_example(elsewhere, "elsewhere", count, device)
    if not relative:
        return gap
    return torch.where(explained == 0, float("nan"), gap / explained.abs())
