"""Linear maps with constant weights: linear layers, convolutions, products with a constant matrix, pooling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.node import Grads, Node
from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.registry import handles
from captum_transformer_attr.recording.tags import Tag, tag_of


class LinearMap(Node):
    """``y = map(x, weight) + bias``, linear in ``x`` and in ``weight``.

    Rules need no more than ``map`` and ``pullback``.
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()

    def map(self, x: Tensor, weight: Tensor) -> Tensor:
        """The map without its bias."""
        raise NotImplementedError

    def pullback(self, s: Tensor, weight: Tensor) -> Tensor:
        """Transposed map: the vector-Jacobian product of ``map`` with respect to ``x``."""
        with torch.enable_grad():
            x = torch.zeros_like(self.x).requires_grad_()
            (result,) = torch.autograd.grad(self.map(x, weight), x, s)
        return result

    def biased(self, y: Tensor) -> Tensor:
        """``y`` plus the bias, shaped for broadcasting."""
        return y if self.bias is None else y + self.bias

    def unbiased(self) -> Tensor:
        """The output without the bias, from the kept output: cheaper than mapping again."""
        return self.y if self.bias is None else self.y - self.bias

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.keep("x", x)
        y = self.biased(self.map(x, self.weight))
        self.keep("y", y)
        return y

    def gradient(self, g: Tensor) -> Grads:
        return (self.pullback(g, self.weight),)

    def spread(self, r: Tensor) -> Tensor:
        """Flat rule: every output shares its relevance equally among the inputs it reads."""
        reads = (self.weight != 0).to(r.dtype)
        count = self.map(torch.ones_like(self.x), reads)
        return self.pullback(torch.where(count == 0, 0, r / count.clamp(min=1e-30)), reads)


class Linear(LinearMap):
    """``F.linear``: over the last axis."""

    label = "linear"
    mixes_tokens = False

    def map(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def pullback(self, s: Tensor, weight: Tensor) -> Tensor:
        return s @ weight

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.keep("x", x)
        y = F.linear(x, self.weight, self.bias)
        self.keep("y", y)
        return y

    def spread(self, r: Tensor) -> Tensor:
        return (r.sum(-1, keepdim=True) / self.x.shape[-1]).expand_as(self.x)


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


class ConstantProduct(LinearMap):
    """Matrix product with a constant on either side."""

    label = "product with a constant matrix"

    def __init__(self, weight: Tensor, left: bool) -> None:
        super().__init__(weight)
        self.left = left

    def map(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight @ x if self.left else x @ weight


class Pool(LinearMap):
    """Mean, sum and average pooling, interpolation: fixed non-negative weights that no parameter holds."""

    label = "pooling"

    def __init__(self, function: Any, one: Tensor) -> None:
        super().__init__(one)
        self.function = function

    def map(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.function(x) * weight

    def spread(self, r: Tensor) -> Tensor:
        # Rows that are exactly zero were masked out before the pooling and take no part in it.
        present = self.x != 0
        features = lay.feature_axes(getattr(self, "input_layout", None))
        if features:
            present = present.any(features, keepdim=True).expand_as(present)
        weights = present.to(r.dtype)
        count = self.map(weights, self.weight)
        share = torch.where(count == 0, 0, r / torch.where(count == 0, 1, count))
        return self.pullback(share, self.weight) * weights


# ---------------------------------------------------------------------- what makes these nodes
def live_weight(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the weights themselves depend on an input (a hypernetwork): then the product is bilinear."""
    return weight.requires_grad or (bias is not None and bias.requires_grad)


def after_linear(x: Tensor, layout: lay.Layout | None) -> dict[str, Any]:
    tag = tag_of(x)
    # A map over the head axis of attention maps (talking heads) leaves scores scores and probabilities probabilities.
    role = tag.role if tag and tag.role in (tags.SCORES, tags.PROBABILITY) else tags.PLAIN
    return {"weighted": (tag.weighted if tag else 0) + 1, "layout": layout, "role": role}


def last_axis_to_features(x: Tensor, size: int) -> lay.Layout | None:
    tag = tag_of(x)
    if tag is None or tag.layout is None:
        return None
    return (*tag.layout[:-1], lay.axis(lay.FEATURE, size))


@handles("linear")
def linear(recorder: Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if live_weight(weight, bias):
        with recorder:
            out = torch.matmul(input, weight.transpose(-1, -2))
            return out if bias is None else out + bias
    node = Linear(weight, bias)
    tag = tag_of(input)
    if tag is not None and tag.layout is not None:
        *others, last = lay.labels(tag.layout)
        # Over the pixels inside a patch, while the patches are another part of the same axis, it is a convolution (a
        # cosine transform of blocks).
        inside = tag.attention == 0 and last <= set().union(*others)
        node.mixes_tokens = (
            bool(last) and lay.FEATURE not in last and any(lay.FEATURE in f for f in others) and not inside
        )
    return recorder.run(node, input, **after_linear(input, last_axis_to_features(input, weight.shape[0])))


@handles("addmm")
def addmm(recorder: Recorder, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if input.requires_grad or mat2.requires_grad:
        with recorder:
            return beta * input + alpha * (mat1 @ mat2)
    return linear(recorder, mat1, alpha * mat2.T, (beta * input).expand(mat2.shape[1]))


def constant_product(recorder: Recorder, a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` where one operand is constant."""
    if a.requires_grad and b.ndim == 2:
        out: Tensor = linear(recorder, a, b.T)
        return out
    x, weight, left = (a, b, False) if a.requires_grad else (b, a, True)
    tag = tag_of(x)
    shape = lay.broadcast_shape(a.shape[:-2], b.shape[:-2]) if a.ndim > 1 and b.ndim > 1 else ()
    layout = None
    if tag is not None and tag.layout is not None and a.ndim > 1 and b.ndim > 1:
        full = lay.broadcast([(tag.layout, x.shape)], (*shape, *x.shape[-2:]))
        if full is not None:
            sizes = (*shape, a.shape[-2], b.shape[-1])
            changed = full[:-2] + (
                (lay.axis(lay.MIXED, sizes[-2]), full[-1]) if left else (full[-2], lay.axis(lay.FEATURE, sizes[-1]))
            )
            layout = changed
    node = ConstantProduct(weight, left)
    return recorder.run(node, x, **after_linear(x, layout))


def convolve(recorder: Recorder, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Any:
    if live_weight(weight, bias):
        return NotImplemented
    dims = weight.ndim - 2
    batched = x.ndim == weight.ndim
    if not batched:
        return NotImplemented
    stride, _, _, transposed, _, _ = geometry
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


def pool(recorder: Recorder, x: Tensor, function: Any, layout: lay.Layout | None, **tag: Any) -> Tensor:
    """Record ``function``, a fixed linear map with non-negative weights."""
    node = Pool(function, x.new_ones(()))
    known = tag_of(x)
    node.input_layout = known.layout if known else None  # type: ignore[attr-defined]
    return recorder.run(node, x, **{"layout": layout, **tag})


def dims_of(x: Tensor, dim: Any) -> tuple[int, ...]:
    """The reduced axes as non-negative numbers; None or () means all."""
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return tuple(range(x.ndim))
    return tuple(d % x.ndim for d in ((dim,) if isinstance(dim, int) else dim))


def reduction(name: str) -> Any:
    function = getattr(torch, name)

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
        tag = tag_of(input)
        dims = dims_of(input, dim)
        if tag is not None and tag.parts and dims == (tag.parts_dim,) and not keepdim:
            with recorder:  # the sum of a stack is the sum of its parts: parallel branches of a residual
                total = tag.parts[0]
                for part in tag.parts[1:]:
                    total = total + part
                return total if name == "sum" else total / len(tag.parts)
        if name == "sum":
            from captum_transformer_attr.ops.product import summed_product

            contraction = summed_product(recorder, input, dims, keepdim)
            if contraction is not None:
                return contraction
        layout_before = tag.layout if tag else None
        layout = lay.without(layout_before, dims, keepdim)
        # Over channels it may belong to a normalisation written by hand. A mean that keeps its axes is a function of
        # what it is taken of.
        channels = lay.feature_axes(layout_before) or (input.ndim - 1,)
        statistic = keepdim or set(dims) <= set(channels)
        root = tag.origin if tag and name == "mean" and keepdim else -1
        return pool(
            recorder,
            input,
            lambda x: function(x, dims, keepdim=keepdim, dtype=dtype),
            layout,
            role=role_of_reduction(tag, dims, input.ndim, statistic),
            root=root,
        )

    return handler


def role_of_reduction(tag: Tag | None, dims: tuple[int, ...], ndim: int, statistic: bool) -> str:
    """Maps that are averaged over heads (or any axis in front of theirs) stay maps, before the softmax and after it."""
    if tag is not None and tag.role in (tags.SCORES, tags.PROBABILITY) and max(dims) < ndim - 2:
        return tag.role
    return tags.MEAN if statistic else tags.PLAIN


handles("mean")(reduction("mean"))
handles("sum")(reduction("sum"))


def fixed_pooling(recorder: Recorder, function: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Average pooling and interpolation: batch and channels stay, space is resampled."""
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
