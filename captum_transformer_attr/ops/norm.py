"""Normalisations: layer, RMS, batch, group and L2 norms, as functions or written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.node import Grads, LocalNode, Node
from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.registry import handles
from captum_transformer_attr.recording.tags import tag_of


class Norm(Node):
    """``y = (x − mean) / deviation · scale + shift``.

    ``centre`` says whether the mean is subtracted; with frozen statistics the map is linear in ``x``:
    ``frozen_gradient`` is its transpose.
    """

    label = "normalisation"
    x: Tensor
    y: Tensor
    shift: Tensor | None = None

    def frozen_gradient(self, g: Tensor) -> Tensor:
        """Gradient with the deviation (not the mean) held constant."""
        raise NotImplementedError

    def deviation(self) -> Tensor:
        """Standard deviation (or root mean square) of every normalised group, broadcastable against ``x``."""
        raise NotImplementedError


class LayerNorm(Norm):
    """``F.layer_norm`` and ``F.rms_norm`` over the last axes."""

    label = "layer norm"

    def __init__(self, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float, centre: bool) -> None:
        self.normalized_shape = [shape] if isinstance(shape, int) else list(shape)
        self.weight, self.shift = (None if t is None else t.detach() for t in (weight, bias))
        self.eps, self.centre = eps, centre
        self.dims = tuple(range(-len(self.normalized_shape), 0))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if self.centre:
            y = F.layer_norm(x, self.normalized_shape, self.weight, self.shift, self.eps)
        else:
            y = F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        self.keep("x", x)
        return y

    def deviation(self) -> Tensor:
        second = (
            self.x.var(self.dims, correction=0, keepdim=True)
            if self.centre
            else self.x.square().mean(self.dims, keepdim=True)
        )
        return (second + (torch.finfo(self.x.dtype).eps if self.eps is None else self.eps)).sqrt()

    def frozen_gradient(self, g: Tensor) -> Tensor:
        g = (g if self.weight is None else g * self.weight) / self.deviation()
        return g - g.mean(self.dims, keepdim=True) if self.centre else g

    def gradient(self, g: Tensor) -> Grads:
        if self.centre:
            moments = torch.native_layer_norm(self.x, self.normalized_shape, None, None, self.eps)[1:]
            backward = torch.ops.aten.native_layer_norm_backward
            return (
                backward(
                    g.contiguous(), self.x, self.normalized_shape, *moments, self.weight, None, [True, False, False]
                )[0],
            )
        deviation = self.deviation()
        normal = self.x / deviation
        g = g if self.weight is None else g * self.weight
        return ((g - normal * (g * normal).mean(self.dims, keepdim=True)) / deviation,)


class BatchNorm(Norm):
    """``F.batch_norm`` in evaluation: an affine map per channel (axis 1)."""

    label = "batch norm"

    def __init__(self, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        self.mean, self.variance, self.eps = mean, variance, eps
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.keep("x", x)
        shape = (1, -1, *(1,) * (x.ndim - 2))
        scale = (self.variance + self.eps).rsqrt() * (1 if self.weight is None else self.weight.detach())
        shift = -self.mean * scale + (0 if self.bias is None else self.bias.detach())
        self.scale, self.shift = scale.reshape(shape).to(x.dtype), shift.reshape(shape).to(x.dtype)
        return F.batch_norm(x, self.mean, self.variance, self.weight, self.bias, False, 0.0, self.eps)

    def deviation(self) -> Tensor:
        return (self.variance + self.eps).sqrt().reshape(1, -1, *(1,) * (self.x.ndim - 2))

    def frozen_gradient(self, g: Tensor) -> Tensor:
        return g * self.scale

    def gradient(self, g: Tensor) -> Grads:
        return (g * self.scale,)


class GroupNorm(LocalNode, Norm):
    """``F.group_norm`` and ``F.instance_norm``: statistics over groups of channels and all positions."""

    label = "group norm"

    def __init__(self, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        self.groups, self.eps = groups, eps
        self.weight, self.bias = (None if t is None else t.detach() for t in (weight, bias))
        self.function = lambda x: F.group_norm(x, groups, self.weight, self.bias, eps)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        shape = (1, -1, *(1,) * (x.ndim - 2))
        self.shift = None if self.bias is None else self.bias.reshape(shape)
        self.factor = x.new_ones(()) if self.weight is None else self.weight.reshape(shape)
        y = LocalNode.forward(self, x)
        self.x = self.leaves[0].detach()
        return y

    def grouped(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self.groups, -1)

    def deviation(self) -> Tensor:
        groups = (self.grouped(self.x).var(-1, correction=0, keepdim=True) + self.eps).sqrt()
        return groups.expand(-1, -1, self.x[0].numel() // self.groups).reshape(self.x.shape)

    def frozen_gradient(self, g: Tensor) -> Tensor:
        g = self.grouped(g * self.factor / self.deviation())
        return (g - g.mean(-1, keepdim=True)).reshape(self.x.shape)


class Centring(Node):
    """``x − mean(x)`` written by hand, the first half of a layer norm: linear, and part of the norm for the rules."""

    label = "centring"

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:  # type: ignore[override]
        self.mean_shape = mean.shape
        return x - mean

    def gradient(self, g: Tensor) -> Grads:
        return g, -g.sum_to_size(self.mean_shape)


class Statistic(LocalNode):
    """A norm, variance or standard deviation of ``x``.

    What it scales sends it nothing; where a signal arrives, it is content (statistics pooling).

    It is homogeneous: Σ x ∂y/∂x = degree · y (Euler). dims: the axes it was taken over.
    """

    label = "statistic"

    def __init__(self, degree: int, dims: tuple[int, ...]) -> None:
        self.degree, self.dims = degree, dims

    def spread(self, r: Tensor) -> Tensor:
        """Equal shares to everything the statistic was taken of."""
        x = self.leaves[0]
        kept = [1 if i in self.dims else size for i, size in enumerate(x.shape)]
        return (r.reshape(kept) / (x.numel() / r.numel())).expand_as(x)


def normalise(recorder: Recorder, node: Norm, x: Tensor) -> Tensor:
    tag = tag_of(x)
    role = tag.role if tag and tag.role in (tags.SCORES, tags.PROBABILITY) else tags.PLAIN
    return recorder.run(node, x, layout=tag.layout if tag else None, role=role)


@handles("layer_norm")
def layer_norm(
    recorder: Recorder,
    input: Tensor,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    if any(isinstance(t, Tensor) and t.requires_grad for t in (weight, bias)):
        return NotImplemented
    return normalise(recorder, LayerNorm(normalized_shape, weight, bias, eps, centre=True), input)


@handles("native_layer_norm")
def native_layer_norm(
    recorder: Recorder, input: Tensor, normalized_shape: Any, weight: Any, bias: Any, eps: float
) -> Any:
    """A layer norm that also returns its statistics."""
    dims = tuple(range(-len(normalized_shape), 0))
    with recorder:
        y = F.layer_norm(input, normalized_shape, weight, bias, eps)
        deviation = (torch.var(input, dims, correction=0, keepdim=True) + eps).sqrt()
        return y, input.mean(dims, keepdim=True), 1 / deviation


@handles("rms_norm")
def rms_norm(recorder: Recorder, input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
    return normalise(recorder, LayerNorm(normalized_shape, weight, None, eps, centre=False), input)


@handles("batch_norm")
def batch_norm(
    recorder: Recorder,
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    if training or running_mean is None:
        return NotImplemented  # statistics of the batch couple its examples: refused by the audit
    return normalise(recorder, BatchNorm(running_mean, running_var, weight, bias, eps), input)


@handles("group_norm")
def group_norm(
    recorder: Recorder, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    return normalise(recorder, GroupNorm(num_groups, weight, bias, eps), input)


@handles("instance_norm")
def instance_norm(
    recorder: Recorder,
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    if not use_input_stats:
        return batch_norm(recorder, input, running_mean, running_var, weight, bias, False, momentum, eps)
    return normalise(recorder, GroupNorm(input.shape[1], weight, bias, eps), input)


def centred(recorder: Recorder, x: Tensor, mean: Tensor) -> Tensor:
    """``x − mean(x)``."""
    tag = tag_of(x)
    assert tag is not None
    return recorder.run(Centring(), x, mean, layout=tag.layout, weighted=tag.weighted, attention=tag.attention)


def statistic(
    recorder: Recorder, input: Tensor, function: Callable[[Tensor], Tensor], degree: int, dims: tuple[int, ...]
) -> Tensor:
    """Record ``function``, a statistic of this degree over the axes ``dims``."""
    node = Statistic(degree, dims)
    node.function = function
    tag = tag_of(input)
    keeps = function(input.detach()).ndim == input.ndim
    layout = lay.without(tag.layout, dims, keeps) if tag else None
    return recorder.run(node, input, layout=layout, role=tags.STATISTIC)


def norm_handler(function: Any) -> Any:
    def handler(recorder: Recorder, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        dims = lay.dims_of(input, kwargs.get("dim", args[1] if len(args) > 1 else None))
        return statistic(recorder, input, lambda x: function(x, *args, **kwargs), 1, dims)

    return handler


for _name, _function in (
    ("norm", torch.norm),
    ("linalg_norm", torch.linalg.norm),
    ("linalg_vector_norm", torch.linalg.vector_norm),
):
    handles(_name)(norm_handler(_function))


def spread_options(
    dim: Any = None,
    unbiased: Any = None,
    keepdim: bool = False,
    *,
    correction: Any = None,
    axis: Any = None,
    keepdims: Any = None,
) -> dict[str, Any]:
    """The arguments of a variance in any of torch's signatures, as those of one."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    if correction is None:
        correction = 1 if unbiased is None else int(unbiased)
    return {
        "dim": dim if axis is None else axis,
        "correction": correction,
        "keepdim": keepdim if keepdims is None else keepdims,
    }


def spread_handler(function: Any, degree: int, with_mean: bool) -> Any:
    def handler(recorder: Recorder, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        options = spread_options(*args, **kwargs)
        dims = lay.dims_of(input, options["dim"])
        spread = statistic(recorder, input, lambda x: function(x, **options), degree, dims)
        with recorder:
            return (spread, input.mean(dims, keepdim=options["keepdim"])) if with_mean else spread

    return handler


for _name, _function, _degree in (("var", torch.var, 2), ("std", torch.std, 1)):
    handles(_name)(spread_handler(_function, _degree, with_mean=False))
    handles(f"{_name}_mean")(spread_handler(_function, _degree, with_mean=True))
