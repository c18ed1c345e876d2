"""Convolutions in one to three dimensions, also transposed ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_transformer_attr.ops.linear import LinearMap, after_linear, live_weight
from captum_transformer_attr.ops.stacked import refuse_lost
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.registry import handles
from captum_transformer_attr.recording.tags import tag_of


class Convolution(LinearMap):
    """Convolution in one to three dimensions, also transposed; ``geometry`` as in ``torch.convolution``."""

    label = "convolution"

    def __init__(self, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> None:
        super().__init__(weight, None if bias is None else bias.reshape(-1, *(1,) * (weight.ndim - 2)))
        self.geometry = geometry

    def map(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.convolution(x, weight, None, *self.geometry)

    def pullback(self, s: Tensor, weight: Tensor) -> Tensor:
        mask = [True, False, False]
        return torch.ops.aten.convolution_backward(s.contiguous(), self.x, weight, None, *self.geometry, mask)[0]

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.keep("x", x)
        y = torch.convolution(x, self.weight, None if self.bias is None else self.bias.flatten(), *self.geometry)
        self.keep("y", y)
        return y

    def spread(self, r: Tensor) -> Tensor:
        # Channels do not matter to a token's relevance, so one flat channel stands for all of them.
        stride, padding, dilation, transposed, output_padding, _ = self.geometry
        geometry = (stride, padding, dilation, transposed, output_padding, 1)
        flat = self.weight.new_ones(1, 1, *self.weight.shape[2:])
        ones = torch.ones_like(self.x[:, :1])
        count = torch.convolution(ones, flat, None, *geometry)
        share = torch.where(count == 0, 0, r.sum(1, keepdim=True) / count.clamp(min=1e-30))
        back = torch.ops.aten.convolution_backward(share, ones, flat, None, *geometry, [True, False, False])[0]
        return (back / self.x.shape[1]).expand_as(self.x)


def convolve(recorder: Recorder, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Any:
    if live_weight(weight, bias):
        return NotImplemented
    dims = weight.ndim - 2
    batched = x.ndim == weight.ndim
    if not batched:
        return NotImplemented
    stride, _, _, transposed, _, groups = geometry
    if x.shape[1] != (weight.shape[0] if transposed else weight.shape[1] * groups):
        return NotImplemented  # torch says which number of channels it wants
    refuse_lost(recorder, x, range(1, x.ndim))
    tag = tag_of(x)
    node = Convolution(weight, bias, geometry)
    shape = [x.shape[0], *torch.convolution(x.detach()[:0].to("meta"), weight.to("meta"), None, *geometry).shape[1:]]
    layout = lay.resized(tag.layout, [shape[0], x.shape[1], *shape[2:]]) if tag else None
    if layout is not None:
        layout = (layout[0], lay.axis(lay.FEATURE, shape[1]), *layout[2:])
    before = tag.stride if tag and tag.stride else (1,) * dims
    after = before if transposed or len(before) != dims else tuple(a * b for a, b in zip(before, stride, strict=True))
    return recorder.run(node, x, **{**after_linear(x, layout), "stride": after})


def per_axis(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def convolution_handler(dims: int) -> Any:
    def handler(
        recorder: Recorder,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        stride, dilation = per_axis(stride, dims), per_axis(dilation, dims)
        if isinstance(padding, str):
            total = [0 if padding == "valid" else d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if any(t % 2 for t in total):
                # Even kernels with "same" padding need one more zero at the end.
                with recorder:
                    input = F.pad(input, [p for t in total[::-1] for p in (0, t % 2)])
            padding = [t // 2 for t in total]
        geometry = (stride, per_axis(padding, dims), dilation, False, (0,) * dims, groups)
        return convolve(recorder, input, weight, bias, geometry)

    return handler


def transposed_handler(dims: int) -> Any:
    def handler(
        recorder: Recorder,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        geometry = tuple(per_axis(v, dims) for v in (stride, padding, dilation)) + (
            True,
            per_axis(output_padding, dims),
            groups,
        )
        return convolve(recorder, input, weight, bias, geometry)

    return handler


for _dims in (1, 2, 3):
    handles(f"conv{_dims}d")(convolution_handler(_dims))
    handles(f"conv_transpose{_dims}d")(transposed_handler(_dims))
