"""Means and sums over axes: pooling, the contraction of a product, or the sum of what was stacked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.ops.pooling import pool
from captum_transformer_attr.ops.product import summed_product
from captum_transformer_attr.ops.stacked import refuse_lost, summed, value
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.registry import handles
from captum_transformer_attr.recording.tags import Tag, tag_of


def reduction(name: str) -> Any:
    def handler(
        recorder: Recorder,
        input: Tensor,
        *args: Any,
        dim: Any = None,
        keepdim: bool = False,
        dtype: Any = None,
        axis: Any = None,
        keepdims: Any = None,
    ) -> Any:
        dim = dim if dim is not None else axis
        if args:
            if len(args) > 1 and not isinstance(args[1], bool):
                dim = args
            else:
                dim, keepdim = args[0], args[1] if len(args) > 1 else keepdim
        keepdim = keepdim if keepdims is None else keepdims
        return reduced(recorder, name, input, lay.dims_of(input, dim), keepdim, dtype)

    return handler


def reduced(
    recorder: Recorder, name: str, input: Tensor, dims: tuple[int, ...], keepdim: bool, dtype: torch.dtype | None
) -> Tensor:
    """Record the mean or the sum (``name``) over ``dims``."""
    tag = tag_of(input)
    if tag is not None and tag.intact and tag.parts_dim in dims:
        with recorder:
            return of_parts(name, tag, dims, keepdim, dtype)
    refuse_lost(recorder, input, dims)
    if name == "sum":
        contraction = summed_product(recorder, input, dims, keepdim)
        if contraction is not None:
            return contraction
    function, before = getattr(torch, name), tag.layout if tag else None
    # Over channels it may belong to a normalisation written by hand. A mean that keeps its axes is a function of what
    # it is taken of.
    channels = lay.feature_axes(before) or (input.ndim - 1,)
    statistic = keepdim or set(dims) <= set(channels)
    return pool(
        recorder,
        input,
        lambda x: function(x, dims, keepdim=keepdim, dtype=dtype),
        lay.without(before, dims, keepdim),
        role=role_of_reduction(tag, dims, input.ndim, statistic),
        root=tag.origin if tag and name == "mean" and keepdim else -1,
    )


def of_parts(name: str, tag: Tag, dims: tuple[int, ...], keepdim: bool, dtype: torch.dtype | None) -> Tensor:
    """A stack's mean or sum over its own axis, and over others: parallel branches of a residual are summed."""
    result: Tensor = summed(map(value, tag.parts))
    result = result if name == "sum" else result / len(tag.parts)
    rest = tuple(d - (d > tag.parts_dim) for d in dims if d != tag.parts_dim)
    if rest:
        result = getattr(result, name)(rest, keepdim=keepdim)
    result = result.unsqueeze(tag.parts_dim) if keepdim else result
    return result if dtype is None else result.to(dtype)


def role_of_reduction(tag: Tag | None, dims: tuple[int, ...], ndim: int, statistic: bool) -> str:
    """Maps that are averaged over heads (or any axis in front of theirs) stay maps, before the softmax and after it."""
    if tag is not None and tag.role in (tags.SCORES, tags.PROBABILITY) and max(dims) < ndim - 2:
        return tag.role
    return tags.MEAN if statistic else tags.PLAIN


handles("mean")(reduction("mean"))
handles("sum")(reduction("sum"))
