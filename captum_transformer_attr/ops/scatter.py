"""Sums at given positions: ``index_add``, ``scatter_add``, ``index_put`` with accumulation, ``fold``.

Mixtures of experts gather their outputs so. A contribution is placed (and contributions to one place are added up) by
a fixed linear map, then added to what is there already. An expert is what the router's gate multiplies, so its output
is content: it keeps the share of the sum that it contributes, gate included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_transformer_attr.ops.pooling import pool
from captum_transformer_attr.ops.residual import Sum, add
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.registry import handles
from captum_transformer_attr.recording.tags import Tag, tag_of


class Accumulation(Sum):
    """``a + b``: ``a`` collects contributions to one sum, ``b`` is the next of them; siblings whatever their origin."""

    label = "sum of contributions"

    def __init__(self, a: Tag, b: Tag) -> None:
        super().__init__(a, b, 0)
        self.trunk, self.fork, self.attends = None, None, (False, False)


def contribute(recorder: Recorder, input: Tensor, source: Tensor, place: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``input`` plus the contributions ``source``.

    ``place(zeros, source)`` puts them into zeros of ``input``'s shape.
    """
    if not source.requires_grad:
        zeros = torch.zeros_like(input, requires_grad=False)
        return add(recorder, input, place(zeros, source))  # type: ignore[no-any-return]
    known, tag = tag_of(input), tag_of(source)
    zeros = torch.zeros_like(input, requires_grad=False)
    layout = known.layout if known else lay.fallback(tag.layout if tag else None, input.shape)
    placed = pool(recorder, source, lambda s: place(zeros.to(s.dtype), s), layout)
    if not input.requires_grad:
        return placed if not bool(input.any()) else add(recorder, placed, input)  # type: ignore[no-any-return]
    new = tag_of(placed)
    if known is None or new is None or new.comes_from(known):
        return add(recorder, input, placed)  # type: ignore[no-any-return]
    return recorder.run(Accumulation(known, new), input, placed, layout=layout)


@handles("index_add", "index_add_")
def index_add(
    recorder: Recorder, input: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1
) -> Tensor:
    with recorder:
        source = source if alpha == 1 else source * alpha
    return contribute(recorder, input, source, lambda zeros, s: zeros.index_add(dim, index, s))


@handles("scatter_add", "scatter_add_")
def scatter_add(recorder: Recorder, input: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    return contribute(recorder, input, src, lambda zeros, s: zeros.scatter_add(dim, index, s))


@handles("scatter_reduce", "scatter_reduce_")
def scatter_reduce(
    recorder: Recorder, input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Any:
    if reduce != "sum" or not include_self:
        return NotImplemented
    return scatter_add(recorder, input, dim, index, src)


@handles("index_put", "index_put_")
def index_put(recorder: Recorder, input: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Any:
    if not accumulate:
        return NotImplemented
    return contribute(recorder, input, values, lambda zeros, s: zeros.index_put(indices, s, accumulate=True))


@handles("fold")
def fold(recorder: Recorder, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Overlapping patches are added up."""
    tag = tag_of(input)
    shape = F.fold(input.detach(), *args, **kwargs).shape
    layout = lay.fallback(tag.layout if tag else None, shape)
    return pool(recorder, input, lambda x: F.fold(x, *args, **kwargs), layout)
