"""The ``deep_taylor`` table: relevance of Chefer, Gur and Wolf (CVPR 2021), section 3.1, made exact per example.

Carries relevance itself, starting from 1 at the selected output; the total is conserved.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from captum_transformer_attr.ops.attention import FusedAttention, ValueProduct
from captum_transformer_attr.ops.bilinear import MatMul, unbroadcast
from captum_transformer_attr.ops.custom import Custom
from captum_transformer_attr.ops.division import STABILISER, divide, is_nothing
from captum_transformer_attr.ops.elementwise import Elementwise, Scale
from captum_transformer_attr.ops.embedding import Embedding
from captum_transformer_attr.ops.linear import LinearMap
from captum_transformer_attr.ops.norm import Centring, Norm, Statistic
from captum_transformer_attr.ops.pooling import Pool
from captum_transformer_attr.ops.product import Product
from captum_transformer_attr.ops.residual import ConstantSum, Sum
from captum_transformer_attr.ops.scatter import Accumulation
from captum_transformer_attr.ops.shape import Join
from captum_transformer_attr.ops.softmax import Softmax
from captum_transformer_attr.recording.constants import share_of_constants
from captum_transformer_attr.recording.node import Grads, Node
from captum_transformer_attr.recording.signal import Rule, Signal, ordinary
from captum_transformer_attr.recording.token_ids import Combined


def identity(node: Node, r: Tensor, signal: Signal) -> Grads:
    """Softmax, norms, activations pass relevance on unchanged."""
    return (r,)


# Positive contributions below this share of all contributions are rounding of a sum that has none.
SMALLEST_SHARE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def z_plus(node: LinearMap, r: Tensor, signal: Signal) -> Grads:
    """z⁺ rule (CVPR 2021, eq. 3-4), bias ignored, one shared denominator.

    R = x⁺ ⊙ S W⁺ + x⁻ ⊙ S W⁻ with S = R / (x⁺W⁺ + x⁻W⁻).

    Three products instead of four: x⁺W⁺ + x⁻W⁻ = (xW + |x||W|) / 2, whose first term is the forward's own output
    without its bias. An output without any positive contribution (frequent where few inputs are read: depthwise
    convolutions, talking heads) shares its relevance in proportion to its negative ones, R = x ⊙ S W with S = R / xW;
    the published rule loses it.
    """
    x, magnitude, weight = node.x, node.x.abs(), node.weight.abs()
    size = node.map(magnitude, weight)
    y = node.unbiased()
    limit = 10 * torch.finfo(r.dtype).eps / SMALLEST_SHARE[r.dtype]
    if node.bias is not None and bool((size < limit * node.bias.abs()).any()):
        y = node.map(x, node.weight)  # what the inputs contribute was lost in the rounding of a larger bias
    # Only an all-zero input (padding, probabilities that underflow) gives size 0: then the output is nothing but bias.
    empty = is_nothing(size)
    node.absorb(lambda: torch.where(empty, r, 0))
    z = y + size
    negative = (z <= size * SMALLEST_SHARE[r.dtype]) | empty
    signed = s = r / z
    if bool(negative.any()):
        s = torch.where(negative, 0, s)
        signed = s + torch.where(negative & ~empty, r / y, 0)
    return (node.pullback(signed, node.weight).mul_(x).addcmul_(node.pullback(s, weight), magnitude),)


def proportional(node: Pool, r: Tensor, signal: Signal) -> Grads:
    """LRP-0 of mean, sum and average pooling: R_i = x_i w_i · R / Σ x w.

    Where the sum is 0 the weights alone decide.
    """
    empty = node.y == 0
    result = node.x * node.pullback(divide(r, node.y), node.weight)
    return (result + node.spread(torch.where(empty, r, 0)) if bool(empty.any()) else result,)


def of_zeros(r: Tensor, y: Tensor, size: Callable[[], Tensor]) -> Tensor:
    """Relevance of outputs ``y`` that are sums of zeros only (padded tokens).

    There is nothing it could be sent on to. ``size``: sums of magnitudes.
    """
    empty = is_nothing(y)
    return torch.where(empty & is_nothing(size()), r, 0) if bool(empty.any()) else torch.zeros_like(r)


def matrix_product(node: MatMul, r: Tensor, signal: Signal) -> Grads:
    """Both operands get half (CVPR 2021, eq. 7-8): R_U = U ⊙ (S Vᵀ) / 2, R_V = V ⊙ (Uᵀ S) / 2, S = R / UV."""
    node.absorb(lambda: of_zeros(r, node.y, lambda: node.a.abs() @ node.b.abs()))
    s = divide(r, node.y) / 2
    return node.split(node.a * (s @ node.b.mT), node.b * (node.a.mT @ s))


def attention_map(node: ValueProduct | FusedAttention, p: Tensor, s: Tensor, rows: slice) -> Tensor:
    """Relevance of the attention map: R_A = A ⊙ (S Vᵀ) with S = R_out / (2 · out)."""
    return (s[..., rows, :] @ node.value.mT).mul_(p)


def eager_attention(node: ValueProduct, r: Tensor, signal: Signal) -> Grads:
    """The matrix product rule for attention times values; a constant map (learned queries) leaves all to the values."""
    node.absorb(lambda: of_zeros(r, node.y, lambda: node.probability @ node.value.abs()))
    s = divide(r, node.y) / (2 if node.sources[0] is not None else 1)
    p = node.probability
    return node.split(p * (s @ node.value.mT), node.value * (p.mT @ s))


def fused_attention(node: FusedAttention, r: Tensor, signal: Signal) -> Grads:
    """Two matrix products with an identity (softmax, mask, scale) between them.

    q and k get a quarter each, v a half.
    """
    s = divide(r, node.y) / 2
    rq, rk, rv = torch.empty_like(node.query), torch.zeros_like(node.key), torch.zeros_like(node.value)
    node.absorb(lambda: of_zeros(r, node.y, lambda: node.value.abs().sum(-2, keepdim=True)))
    lost = r.new_zeros((*r.shape[:-2], 1, 1))
    for rows in node.blocks():
        scores = node.scores(rows)
        p = node.weights(scores, rows)
        rv += p.mT @ s[..., rows, :]
        t = attention_map(node, p, s, rows)
        empty = scores == 0
        if bool(empty.any()):
            lost += torch.where(empty, t, 0).sum(
                (-2, -1), keepdim=True
            )  # padded keys are zeros, and so are their scores
            t.masked_fill_(empty, 0)
        t = t.div_(scores.add_(node.scale * STABILISER))
        rq[..., rows, :] = t @ node.key
        rk += t.mT @ node.query[..., rows, :]
    # The scores were scaled, the products that they are divided into were not; and both operands share half and half.
    half = node.scale / 2
    parts = (rq.mul_(node.query).mul_(half), rk.mul_(node.key).mul_(half), rv.mul_(node.value))
    for part, alive in zip(parts, node.live, strict=True):
        if not alive:
            lost += part.sum((-2, -1), keepdim=True)
    node.absorb(lambda: (lost / r.shape[-2:].numel()).expand_as(r))
    return node.to_live(*parts)


def residual(node: Sum, r: Tensor, signal: Signal) -> Grads:
    """Proportional to the summands, then rescaled per example (CVPR 2021, eq. 9-10).

    Both totals share Σ R as |Σ R_a| : |Σ R_b|.
    """
    s = divide(r, node.a + node.b)
    ra, rb = rescale(node, node.a * s, node.b * s, r)
    return unbroadcast(ra, node.a.shape), unbroadcast(rb, node.b.shape)


def rescale(node: Node, ra: Tensor, rb: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    parts = [node.per_sample(t.expand(r.shape)) for t in (ra, rb, r)]
    a, b, total = (t.sum((0, 2)) for t in parts)
    size = a.abs() + b.abs()
    factors = (divide(divide(t.abs(), size) * total, t)[:, None] for t in (a, b))
    scaled = [(part * factor).reshape(r.shape) for part, factor in zip(parts[:2], factors, strict=True)]
    return scaled[0], scaled[1]


def accumulation(node: Accumulation, r: Tensor, signal: Signal) -> Grads:
    """LRP-0: every contribution (an expert's output times its gate) keeps its share of the sum."""
    s = divide(r, node.a + node.b)
    return node.a * s, node.b * s


def constant_sum(node: ConstantSum, r: Tensor, signal: Signal) -> Grads:
    """A positional embedding is a summand like any other and keeps its share; biases and masks are ignored."""
    if node.ignored:
        return (unbroadcast(r, node.x.shape),)
    s = divide(r, node.x + node.constant)
    ra, rb = rescale(node, node.x * s, node.constant * s, r)
    node.absorb(lambda: rb)
    return (unbroadcast(ra, node.x.shape),)


def scaling(node: Scale, r: Tensor, signal: Signal) -> Grads:
    """A constant factor changes nothing, except that a factor of 0 lets nothing through."""
    if isinstance(node.factor, Tensor) and bool((node.factor == 0).any()):
        node.absorb(lambda: torch.where((node.factor == 0).expand(r.shape), r, 0))  # type: ignore[union-attr]
        r = torch.where(node.factor == 0, 0, r)
    return (unbroadcast(r, node.x_shape),)


def product(node: Product, r: Tensor, signal: Signal) -> Grads:
    """A gate, a norm or an activation's own factor is part of the channel, not of the content.

    All relevance to the content, so it is conserved.

    Two equals share it half and half, as in a matrix product.
    """
    if node.signal is None:
        return node.split(r / 2, r / 2)
    return node.to_signal(r)


def centring(node: Centring, r: Tensor, signal: Signal) -> Grads:
    """Part of a layer norm: identity, nothing to the mean."""
    return r, None


def statistic(node: Statistic, r: Tensor, signal: Signal) -> Grads:
    """A statistic that is content: R_i = x_i ∂y/∂x_i · R / (degree · y), which conserves R because y is homogeneous."""
    node.absorb(lambda: torch.where(is_nothing(node.y.detach()), r, 0))
    (back,) = node.gradient(divide(r, node.y.detach()) / node.degree)
    return (node.leaves[0].detach() * back,)  # type: ignore[operator]


def embedding(node: Embedding, r: Tensor, signal: Signal) -> Grads:
    """A token gets the sum over its embedding."""
    return (r.sum(-1),)


def joining(node: Join, r: Tensor, signal: Signal) -> Grads:
    """Follow the positions; what lies on constants (class tokens, padding) arrived there."""
    node.absorb(lambda: share_of_constants(signal, node.tag, node.live_positions(), node.y.detach(), r))
    return node.gradient(r)


def custom(node: Custom, r: Tensor, signal: Signal) -> Grads:
    """What the user registered for the module."""
    return node.rule.send(node, r, node.rule.relevance)


TABLE: dict[type[Node], Rule] = {
    Custom: custom,
    LinearMap: z_plus,
    Pool: proportional,
    MatMul: matrix_product,
    ValueProduct: eager_attention,
    FusedAttention: fused_attention,
    Sum: residual,
    Accumulation: accumulation,
    ConstantSum: constant_sum,
    Softmax: identity,
    Norm: identity,
    Elementwise: identity,
    Scale: scaling,
    Product: product,
    Centring: centring,
    Statistic: statistic,
    Embedding: embedding,
    Combined: ordinary,
    Join: joining,
}


def deep_taylor() -> Signal:
    """Relevance by the CVPR 2021 rules."""
    return Signal("deep_taylor", "relevance", TABLE)
