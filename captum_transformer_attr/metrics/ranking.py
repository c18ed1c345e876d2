"""The order in which an attribution would have units (pixels, tokens, words) taken."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_transformer_attr.metrics._inputs import whole_number


def ranks(scores: Tensor, *, descending: bool = True, removable: Tensor | None = None, seed: int = 0) -> Tensor:
    """The place of every unit in the order of its score, 0 first.

    Equal scores are ordered by a pseudo-random permutation of the positions drawn from `seed`: a constant map is then
    as good as a random one, where the reading order would favour whatever stands at the top or the beginning. The
    permutation depends on the number of units alone, so neither batch, device nor run changes the answer.

    Args:
        scores: (N, U)
        removable: (N, U) booleans; units outside are never taken and rank U, behind all others.

    Returns:
        (N, U) integers, a permutation of 0 .. U-1 over the removable units of each row.
    """
    seed, units = whole_number(seed, "seed"), scores.shape[-1]
    permutation = torch.randperm(units, generator=torch.Generator().manual_seed(seed)).to(scores.device)
    order = scores[:, permutation].argsort(dim=-1, descending=descending, stable=True)
    if removable is not None:
        left_out = ~removable[:, permutation].gather(-1, order)
        order = order.gather(-1, left_out.to(torch.uint8).argsort(dim=-1, stable=True))
    places = torch.arange(units, device=scores.device).expand_as(order)
    result = torch.empty_like(order).scatter_(-1, permutation[order], places)
    return result if removable is None else result.masked_fill(~removable, units)
