"""Pooling: fixed linear maps with non-negative weights that no parameter holds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_transformer_attr.ops.linear import LinearMap
from captum_transformer_attr.ops.stacked import refuse_lost
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.registry import handles
from captum_transformer_attr.recording.tags import tag_of


class Pool(LinearMap):
    """Mean, sum and average pooling, interpolation: fixed non-negative weights that no parameter holds."""

    label = "pooling"

    def __init__(self, function: Any, one: Tensor, input_layout: lay.Layout | None) -> None:
        super().__init__(one)
        self.function, self.input_layout = function, input_layout

    def map(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.function(x) * weight

    def spread(self, r: Tensor) -> Tensor:
        # Rows that are exactly zero were masked out before the pooling and take no part in it.
        present = self.x != 0
        features = lay.feature_axes(self.input_layout)
        if features:
            present = present.any(features, keepdim=True).expand_as(present)
        weights = present.to(r.dtype)
        count = self.map(weights, self.weight)
        share = torch.where(count == 0, 0, r / torch.where(count == 0, 1, count))
        return self.pullback(share, self.weight) * weights


def pool(recorder: Recorder, x: Tensor, function: Any, layout: lay.Layout | None, **tag: Any) -> Tensor:
    """Record ``function``, a fixed linear map with non-negative weights."""
    known = tag_of(x)
    node = Pool(function, x.new_ones(()), known.layout if known else None)
    return recorder.run(node, x, **{"layout": layout, **tag})


def fixed_pooling(recorder: Recorder, function: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Average pooling and interpolation: batch and channels stay, space is resampled."""
    refuse_lost(recorder, input, range(2, input.ndim))
    tag = tag_of(input)
    shape = function(input.detach(), *args, **kwargs).shape
    layout = lay.resized(tag.layout, shape) if tag else None
    before = tag.stride if tag and tag.stride else (1,) * (len(shape) - 2)
    sizes = zip(before, input.shape[2:], shape[2:], strict=False)
    stride = tuple(b * max(1, round(i / o)) for b, i, o in sizes)
    return pool(
        recorder,
        input,
        lambda x: function(x, *args, **kwargs),
        layout,
        stride=stride,
        weighted=(tag.weighted if tag else 0) + 1,
    )


@handles("cumsum")
def running_sum(recorder: Recorder, input: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    """Sums over the first channels.

    Along tokens it is part of a recurrence (the decay of a state-space model), which mixes tokens without an attention
    map: refused.
    """
    tag = tag_of(input)
    if tag is None or dim % input.ndim not in lay.feature_axes(tag.layout):
        return NotImplemented
    return pool(recorder, input, lambda x: x.cumsum(dim, dtype=dtype), tag.layout, weighted=tag.weighted + 1)


def register_pooling(function: Any) -> None:
    name = function.__name__

    @handles(name)
    def handler(recorder: Recorder, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return fixed_pooling(recorder, function, input, *args, **kwargs)


for _function in (
    F.avg_pool1d,
    F.avg_pool2d,
    F.avg_pool3d,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
):
    register_pooling(_function)
register_pooling(F.interpolate)
