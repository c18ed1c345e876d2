"""What the tables of modified gradients share: they carry g with R = x ⊙ g, so that a plain linear map needs nothing
but its own gradient.

Whatever a constant contributes (biases, norm shifts, positional embeddings, class tokens, f(0) of an activation) is
counted where it arises; with that the total is exact wherever a rule writes y as a sum of contributions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from captum_transformer_attr.ops.attention import Attention, FusedAttention, ValueProduct
from captum_transformer_attr.ops.bilinear import MatMul
from captum_transformer_attr.ops.custom import Custom
from captum_transformer_attr.ops.elementwise import Gelu, Scale
from captum_transformer_attr.ops.embedding import Embedding
from captum_transformer_attr.ops.linear import LinearMap
from captum_transformer_attr.ops.norm import Centring, Norm, Statistic
from captum_transformer_attr.ops.pooling import Pool
from captum_transformer_attr.ops.product import ACTIVATION, GATED, Product
from captum_transformer_attr.ops.residual import ConstantSum, Sum
from captum_transformer_attr.ops.shape import Join
from captum_transformer_attr.ops.softmax import Softmax
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.constants import share_of_constants
from captum_transformer_attr.recording.node import Grads, LocalNode, Node
from captum_transformer_attr.recording.signal import Rule, Signal, ordinary
from captum_transformer_attr.recording.token_ids import Combined
from captum_transformer_attr.rules.linear_rules import Composite, ZBox


class ModifiedGradient(Signal):
    """A table of modified gradients, with a composite for its linear maps."""

    def __init__(self, name: str, rules: dict[type[Node], Rule], composite: Composite | None = None) -> None:
        super().__init__(name, "gradient", rules)
        self.composite = composite or Composite()


def linear_map(node: LinearMap, g: Tensor, signal: ModifiedGradient) -> Grads:
    """Plain gradient, which is the ε rule at ε = 0; or the composite's rule with R_out = y ⊙ g."""
    rule = signal.composite.rule_for(node)
    if rule is None or isinstance(node, Pool):
        bias = node.bias
        if bias is not None:
            node.absorb(lambda: bias * g)
        return node.gradient(g)
    assert not isinstance(rule, ZBox)
    return (rule.coefficients(node, node.y * g),)


def frozen_norm(node: Norm, g: Tensor, signal: Signal) -> Grads:
    """LN rule (Ali et al. 2022, eq. 9): the deviation is a constant, the rest is linear; the shift keeps its share."""
    shift = node.shift
    if shift is not None:
        node.absorb(lambda: shift * g)
    return (node.frozen_gradient(g),)


def frozen_attention(node: Attention, g: Tensor, signal: Signal) -> Grads:
    """AH rule (Ali et al. 2022, eq. 8): attention weights are constants, everything goes to the values."""
    return node.to_value(sum_blocks(node, g))


def frozen_map(node: Softmax, g: Tensor, signal: Signal) -> Grads:
    """What reaches a frozen map (values that are parameters of relative positions, Shaw et al. 2018) stays there.

    A softmax of anything but scores is a function like any other.
    """
    source = node.sources[0]
    if source is None or source.role != tags.SCORES:
        return node.gradient(g)
    node.absorb(lambda: torch.where(g == 0, 0, node.y.detach() * g))
    return (None,)


def sum_blocks(node: Attention, g: Tensor) -> Tensor:
    """Aᵀ g."""
    first, *others = node.blocks()
    total = node.probabilities(first).mT @ g[..., first, :]
    for rows in others:
        total += node.probabilities(rows).mT @ g[..., rows, :]
    return total


def halved_product(node: MatMul, g: Tensor, signal: Signal) -> Grads:
    """Bilinear rule (Achtibat et al. 2024, eq. 13): both factors get half."""
    return node.gradient(g / 2)


def halved_value_product(node: ValueProduct, g: Tensor, signal: Signal) -> Grads:
    """The bilinear rule for attention times values."""
    return node.gradient(g / 2)


def halved_attention(node: FusedAttention, g: Tensor, signal: Signal) -> Grads:
    """Two bilinear rules with the softmax's own gradient between them: a quarter to queries and keys each, half to the
    values."""
    query, key, value = node.live
    to_map = 0.5 if value else 1.0
    factors = (to_map * (0.5 if key else 1.0), to_map * (0.5 if query else 1.0), 0.5 if query or key else 1.0)
    alive = [factor for factor, lives in zip(factors, node.live, strict=True) if lives]
    return tuple(None if s is None else s * factor for s, factor in zip(node.gradient(g), alive, strict=True))


def tangent(node: LocalNode, g: Tensor, signal: Signal) -> Grads:
    """Plain gradient of an activation; the intercept f(x) − x f'(x) of the tangent is a constant."""
    (back,) = node.gradient(g)
    node.absorb(lambda: node.y.detach() * g - (0 if back is None else input_of(node) * back))
    return (back,)


def input_of(node: LocalNode) -> Tensor:
    """What the function was applied to."""
    return node.x if isinstance(node, Gelu) else node.leaves[0].detach()


def slope(node: LocalNode, g: Tensor, signal: Signal) -> Grads:
    """f(x)/x (Achtibat et al. 2024, eq. 9; Mehri et al. 2025): the secant (f(x) − f(0)) / x, f(0) a constant; the
    derivative at x = 0."""
    x, y = input_of(node), node.y.detach()
    origin = value_at_zero(node)
    if origin is None:
        return tangent(node, g, signal)
    # Near 0 the difference f(x) − f(0) is rounding; where f(0) = 0 it is exact.
    near = (x == 0) | ((origin != 0) & (x.abs() < torch.finfo(x.dtype).eps ** 0.5))
    result = torch.where(near, 0, g * (y - origin) / torch.where(near, 1, x))
    if bool(near.any()):
        (derivative,) = node.gradient(torch.where(near, g, 0))
        result = result + (0 if derivative is None else torch.where(near, derivative, 0))
    node.absorb(lambda: origin * g)
    return (result,)


def value_at_zero(node: LocalNode) -> Tensor | None:
    """f(0); None if it is not finite (logarithm, reciprocal)."""
    x = input_of(node)
    if isinstance(node, Gelu):
        return x.new_zeros(())
    with torch.no_grad():
        origin = node.function(torch.zeros_like(x[:1] if x.ndim else x))
    return origin if bool(origin.isfinite().all()) else None


def content_only(node: Product, g: Tensor) -> Grads:
    """The other factor is a constant: y = a · (b), and all of R goes to the content."""
    first, second = node.gradient(g)
    return (None, second) if node.signal == 1 else (first, None)


def frozen_gate(node: Product, g: Tensor, signal: Signal) -> Grads:
    """Gates, norms and routing weights are constants; an activation written by hand keeps its plain gradient."""
    if node.kind == ACTIVATION:
        # a ∂y/∂a + b ∂y/∂b is 2 y for a product and 0 for a quotient.
        node.absorb(lambda: node.y * g if node.divide else -node.y * g)
        return node.gradient(g)
    return halved_pair(node, g) if node.signal is None else content_only(node, g)


def halved_gate(node: Product, g: Tensor, signal: Signal) -> Grads:
    """A gated product is bilinear: half to the gate, half to the content. x · gate(x) is an activation with slope
    gate(x); norms are constants."""
    if node.signal is None or (node.kind == GATED and not node.divide):
        return halved_pair(node, g)
    return content_only(node, g)


def routed_gate(node: Product, g: Tensor, signal: Signal) -> Grads:
    """As ``halved_gate``, but softmax weights (a router, attention pooling) are as frozen as attention."""
    gate = None if node.signal is None else node.sources[1 - node.signal]
    if gate is not None and gate.role == tags.PROBABILITY:
        return content_only(node, g)
    return halved_gate(node, g, signal)


def halved_pair(node: Product, g: Tensor) -> Grads:
    return node.gradient(g / 2)


def constant_sum(node: ConstantSum, g: Tensor, signal: Signal) -> Grads:
    """The constant keeps its share c ⊙ g; a mask of −∞ has none, because nothing comes back from where it hides."""
    node.absorb(lambda: torch.where(g == 0, 0, node.constant * g))
    return node.gradient(g)


def joining(node: Join, g: Tensor, signal: Signal) -> Grads:
    """Follow the positions; class tokens and padding keep what lies on them."""
    node.absorb(lambda: share_of_constants(signal, node.tag, node.live_positions(), node.y.detach(), g))
    return node.gradient(g)


def custom(node: Custom, g: Tensor, signal: Signal) -> Grads:
    """A module with a registered rule is linearised: gradient, and the intercept of the tangent as a constant."""
    signals = node.gradient(g)
    node.absorb(lambda: node.y.detach() * g - expanded_total(node, signals))
    return signals


def expanded_total(node: Custom, signals: Grads) -> Tensor:
    """Σ x ⊙ g over the inputs, spread evenly over the example's outputs so that per-example sums come out."""
    total = torch.zeros_like(node.y)
    for leaf, g in zip(node.leaves, signals, strict=True):
        if g is not None and leaf.shape == node.y.shape:
            total = total + leaf.detach() * g
        elif g is not None:
            share = (leaf.detach() * g).flatten(1).sum(1) / node.y[0].numel()
            total = total + share.reshape(-1, *(1,) * (node.y.ndim - 1))
    return total


def statistic(node: Statistic, g: Tensor, signal: Signal) -> Grads:
    """Norms and deviations that scale are constants, and nothing arrives here. One that is content is complete by its
    gradient over its degree."""
    return node.gradient(g / node.degree)


SHARED: dict[type[Node], Rule] = {
    LinearMap: linear_map,
    Norm: frozen_norm,
    Centring: ordinary,
    Statistic: statistic,
    MatMul: halved_product,
    Softmax: ordinary,
    Sum: ordinary,
    ConstantSum: constant_sum,
    Scale: ordinary,
    Embedding: ordinary,
    Combined: ordinary,
    Join: joining,
    Custom: custom,
}
"""Rules that cp, attnlrp and libra have in common; each adds attention, activations and gates."""
