"""Elementwise products and quotients of two live tensors: gates, normalisations and activations written by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.ops.bilinear import contracted, unbroadcast
from captum_transformer_attr.ops.elementwise import apply_elementwise, scaled
from captum_transformer_attr.ops.residual import common_root
from captum_transformer_attr.ops.stacked import gated_parts
from captum_transformer_attr.ops.written_softmax import refuse_pieces, written_softmax
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.node import Grads, Node, node_of
from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.registry import handles
from captum_transformer_attr.recording.tags import Tag, tag_of

ACTIVATION, NORMALISATION, GATED, BILINEAR = "activation", "normalisation", "gate", "product"


class Product(Node):
    """``a * b`` (or ``a / b``), both live.

    ``kind`` and ``signal`` say what it means; the rules say what follows from it.

    ``activation``: both are elementwise functions of one tensor (x · sigmoid(x)). ``normalisation``: the other operand
    is a norm or standard deviation of the signal. ``gate``: the other operand is an activation, a softmax weight or
    constant over tokens or channels. ``product``: two equals. ``signal`` is the position of the operand that carries
    the content, None for two equals.
    """

    label = "product"
    a: Tensor
    b: Tensor
    y: Tensor
    factors: tuple[Tensor, ...] = ()  # the live operands, if they have different shapes
    keeps_live = ("factors",)

    def __init__(self, kind: str, signal: int | None, divide: bool = False) -> None:
        self.kind, self.signal, self.divide = kind, signal, divide

    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        y = a / b if self.divide else a * b
        for name, tensor in (("a", a), ("b", b), ("y", y)):
            self.keep(name, tensor)
        return y

    def gradient(self, g: Tensor) -> Grads:
        if self.divide:
            ga = g / self.b
            return self.split(ga, -ga * self.y)
        return self.split(g * self.b, g * self.a)

    def split(self, a: Tensor, b: Tensor) -> Grads:
        """Signals of both operands, summed where an operand was broadcast."""
        return unbroadcast(a, self.a.shape), unbroadcast(b, self.b.shape)

    def to_signal(self, g: Tensor) -> Grads:
        """Everything to the operand that carries the content."""
        shape = (self.a, self.b)[self.signal or 0].shape
        g = unbroadcast(g, shape)
        return (None, g) if self.signal == 1 else (g, None)

    def carriers(self, signal: Any) -> tuple[bool, ...] | None:
        if self.signal is None:
            return None
        return (self.signal == 0, self.signal == 1)


def meaning(a: Tag, b: Tag, left: Tensor, right: Tensor) -> tuple[str, int | None]:
    """Kind of a product, and which operand carries the content."""
    for position, (gate, signal) in enumerate(((b, a), (a, b))):
        if gate.role == tags.STATISTIC and signal.role != tags.STATISTIC:
            return NORMALISATION, position
    if common_root(a, b) >= 0:
        # f(x) = x · gate(x): the operand closer to x is the content.
        return ACTIVATION, 0 if a.role not in (tags.GATE, tags.ACTIVATED) or b.role in (tags.GATE,) else 1
    for position, (weights, gate, shape) in enumerate(((a, b, left.shape), (b, a, right.shape))):
        # A gate for every entry, row, column or head of a map, not what the weights of a mixture are multiplied with.
        gated = weights.role == tags.PROBABILITY and gate.role in (tags.GATE, tags.ACTIVATED)
        if gated and shape == lay.broadcast_shape(left.shape, right.shape):
            return GATED, position
    for gates in ((tags.PROBABILITY,), (tags.GATE,), (tags.ACTIVATED,)):
        found = [t.role in gates for t in (a, b)]
        if found[0] != found[1]:
            return GATED, 0 if found[1] else 1
    if left.numel() != right.numel():
        return GATED, 0 if left.numel() > right.numel() else 1
    return BILINEAR, None


def product(recorder: Recorder, a: Tensor, b: Tensor, divide: bool = False) -> Tensor:
    ta, tb = tag_of(a), tag_of(b)
    assert ta is not None and tb is not None
    for numerator, total in ((a, b),) if divide else ((a, b), (b, a)):
        softmax = written_softmax(recorder, numerator, total, divide)
        if softmax is not None:
            return softmax
        refuse_pieces(recorder, numerator, total, divide)
    kind, signal = meaning(ta, tb, a, b)
    if divide and signal != 0:
        kind, signal = GATED, 0  # a denominator scales, it does not contribute
    shape = lay.broadcast_shape(a.shape, b.shape)
    layout = lay.broadcast([(ta.layout, a.shape), (tb.layout, b.shape)], shape)
    roles = {ta.role, tb.role}
    scaled_map = signal is not None and (ta, tb)[signal].role == tags.PROBABILITY and (divide or len(roles) == 2)
    role = (
        tags.STATISTIC
        if roles == {tags.STATISTIC} or (divide and ta.role == tags.STATISTIC)
        else tags.PROBABILITY
        if scaled_map
        else tags.PLAIN
    )
    if divide and ta.role == tags.SCORES:
        role = tags.SCORES
    if kind == ACTIVATION:
        role = tags.ACTIVATED
    node = Product(kind, signal, divide)
    if kind in (GATED, BILINEAR) and not divide and a.shape != b.shape:
        node.factors = (a, b)
    return recorder.run(
        node,
        a,
        b,
        layout=layout,
        role=role,
        root=common_root(ta, tb),
        weighted=content_weight(ta, tb, signal),
        **({} if signal is None else {"carried": (ta, tb)[signal].carried}),
        **({} if divide else gated_parts(recorder, a, b, shape)),
    )


def summed_product(recorder: Recorder, summed: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor | None:
    """The sum over ``dims`` of a product as a matrix product, if it is one.

    Each factor has an axis that the other one lacks, or a softmax over
    tokens weighs them for every channel alike (attention pooling). None otherwise."""
    node = node_of(summed)
    if not isinstance(node, Product) or not node.factors:
        return None
    a, b = node.factors
    if any(t.ndim != summed.ndim or t.shape[i] != summed.shape[i] for t in (a, b) for i in dims):
        return None
    outer = a.shape != summed.shape != b.shape
    if not outer and not (weighs_tokens(a, dims) or weighs_tokens(b, dims)):
        return None
    with recorder:
        return contracted(a, b, dims, keepdim)


def weighs_tokens(weights: Tensor, dims: tuple[int, ...]) -> bool:
    """Whether these are probabilities over one axis of tokens, along which they are summed."""
    tag = tag_of(weights)
    if tag is None or tag.role != tags.PROBABILITY or tag.layout is None or len(dims) != 1:
        return False
    found = lay.labels(tag.layout)[dims[0]]
    if not found or found & {lay.BATCH, lay.FEATURE, *lay.NOT_TOKENS}:
        return False
    total = weights.detach().sum(dims[0])
    return torch.allclose(total, torch.ones_like(total))


def content_weight(a: Tag, b: Tag, signal: int | None) -> int:
    return min(a.weighted, b.weighted) if signal is None else (a, b)[signal].weighted


@handles("mul", "multiply", "__mul__", "__rmul__", "__imul__")
def multiply(recorder: Recorder, input: Any, other: Any) -> Any:
    live = [isinstance(t, Tensor) and t.requires_grad for t in (input, other)]
    if input is other:
        return apply_elementwise(recorder, torch.square, "square", input)
    if all(live):
        return product(recorder, input, other)
    return scaled(recorder, input, other) if live[0] else scaled(recorder, other, input)


@handles("div", "divide", "true_divide", "__truediv__", "__div__", "__itruediv__")
def divide(recorder: Recorder, input: Any, other: Any, *, rounding_mode: Any = None) -> Any:
    if rounding_mode is not None:
        return NotImplemented
    live = [isinstance(t, Tensor) and t.requires_grad for t in (input, other)]
    if all(live):
        return product(recorder, input, other, divide=True)
    if live[0]:
        return scaled(recorder, input, other, divide=True)
    return reversed_divide(recorder, other, input)


@handles("__rtruediv__", "__rdiv__")
def reversed_divide(recorder: Recorder, input: Tensor, other: Any) -> Any:
    return scaled(recorder, apply_elementwise(recorder, torch.reciprocal, "reciprocal", input), other)


@handles("glu")
def gated_linear_unit(recorder: Recorder, input: Tensor, dim: int = -1) -> Any:
    """The first half of the channels, gated by the second."""
    with recorder:
        content, gate = input.chunk(2, dim)
        return content * gate.sigmoid()


@handles("neg", "negative", "__neg__")
def negate(recorder: Recorder, input: Tensor) -> Any:
    return scaled(recorder, input, -1.0)
