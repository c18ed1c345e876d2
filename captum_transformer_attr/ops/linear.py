"""Linear maps with constant weights: linear layers and products with a constant matrix."""

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
from captum_transformer_attr.recording.tags import tag_of


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


class ConstantProduct(LinearMap):
    """Matrix product with a constant on either side."""

    label = "product with a constant matrix"

    def __init__(self, weight: Tensor, left: bool) -> None:
        super().__init__(weight)
        self.left = left

    def map(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight @ x if self.left else x @ weight


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
