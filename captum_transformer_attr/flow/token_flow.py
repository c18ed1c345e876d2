"""Token flow: relevance per token, sent from the output to the inputs through attention maps and residual trunks.

The signal is any tensor whose channel sum is a token's relevance. One row of the product (Ā_L + I) ··· (Ā_1 + I) is
what arrives, for whatever geometry the graph has: windows, shifts, mergings and class tokens are ordinary views of the
recorded forward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from captum_transformer_attr.errors import UnsupportedOperationError
from captum_transformer_attr.flow.normalisation import over_heads, row_sums, take_second_identity
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.ops.bilinear import MatMul, unbroadcast
from captum_transformer_attr.ops.custom import Custom
from captum_transformer_attr.ops.elementwise import Elementwise, Scale
from captum_transformer_attr.ops.embedding import Embedding
from captum_transformer_attr.ops.linear import Linear, LinearMap
from captum_transformer_attr.ops.norm import Centring, Norm, Statistic
from captum_transformer_attr.ops.product import Product
from captum_transformer_attr.ops.residual import ConstantSum, Sum, common_root
from captum_transformer_attr.ops.scatter import Accumulation
from captum_transformer_attr.ops.shape import Join
from captum_transformer_attr.ops.softmax import Softmax
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.node import Grads, Node
from captum_transformer_attr.recording.signal import Rule, Signal
from captum_transformer_attr.recording.token_ids import Combined

Weights = Callable[[Attention, slice], Tensor]
INPUTS = (1 << 63) - 1  # the bits of ``Tag.ancestors`` that stand for explained inputs


class Flow(Signal):
    """Token flow with attention weights from ``weights(node, rows)``: Ā per head, ``(..., rows, keys)``.

    Heads are averaged by the flow itself.

    Attributes:
        active: the attentions whose weights are used; the others count as identity. None of them (``trunk_only``)
            leaves the pure residual trunk, which is subtracted to take the identity term of the read-out rows out.
        terminals: the sums after which no attention follows; the read-out rows found there are weighted uniformly.
        normalize: divide the rows of (Ā + I) by their sums.
        corrections: origin → flow to take away there, see ``take_second_identity``.
    """

    def __init__(
        self,
        weights: Weights,
        active: Collection[Attention],
        terminals: Collection[Sum],
        trunk_only: bool = False,
        normalize: bool = False,
    ) -> None:
        super().__init__("flow", "flow", TABLE)
        self.normalize = normalize
        self.corrections: dict[int, Tensor] = {}
        self.weights, self.active, self.terminals, self.trunk_only = weights, set(active), set(terminals), trunk_only
        self.seen: dict[Node, Tensor] = {}
        self.reached: set[Node] = set()
        self.watched: Collection[Node] = ()

    def start(self, node: Sum, r: Tensor) -> Tensor:
        """What leaves the last residual for the read-out rows found there."""
        return uniform(node, r)

    def along_trunk(self) -> Flow:
        """The same flow along residual trunks only."""
        return Flow(self.weights, (), self.terminals, trunk_only=True)

    def without_attention(self) -> Flow:
        """A flow between a sum and its own attention, where no other attention lies."""
        return Flow(no_weights, (), ())

    def factors(self, node: Sum) -> tuple[Tensor, Tensor] | None:
        """What the flow into trunk and attention branch of a residual is multiplied by, per token; None for 1."""
        # What a branch adds up by itself (attention plus MLP) is normalised where it joins the trunk, once.
        if not self.normalize or node.trunk is None or not any(node.attends):
            return None
        if any(tag.role == tags.PROBABILITY for tag in node.tags):
            raise UnsupportedOperationError(
                f"module '{node.path}' adds vectors of relative positions that its attention weighs: its rows cannot "
                f"be normalised. Way out: normalize=False."
            )
        factor = 1 / (1 + row_sums(node, self))
        return factor, factor

    def send(self, node: Node, arriving: Tensor) -> Grads:
        if node.tag.origin in self.corrections:
            arriving = arriving - self.corrections.pop(node.tag.origin)
        self.reached.add(node)
        if node in self.watched:
            self.seen[node] = arriving
        return super().send(node, arriving)


def no_weights(node: Attention, rows: slice) -> Tensor:
    """No attention lies between a sum and its own attention."""
    raise AssertionError("unreachable")


def linear_map(node: LinearMap, r: Tensor, signal: Flow) -> Grads:
    """Token-wise or local: a token's total is shared equally among what it was computed from."""
    return (node.spread(r),)


def linear(node: Linear, r: Tensor, signal: Flow) -> Grads:
    if node.mixes_tokens:
        raise UnsupportedOperationError(
            f"module '{node.path}' mixes tokens by a linear layer over the token axis: token relevance cannot follow "
            "attention alone there. "
            f"Way out: TransformerLRP, which needs no attention maps."
        )
    return (node.spread(r),)


def attention(node: Attention, r: Tensor, signal: Flow) -> Grads:
    """r ↦ r Ā from queries to the values' tokens, nothing to queries and keys."""
    if node.over_channels:
        value = (r.sum(-2, keepdim=True) / node.value.shape[-2]).expand_as(node.value)
        return node.to_value(value)
    if signal.trunk_only or node not in signal.active:
        value = torch.zeros_like(node.value)
    else:
        rows_of = over_heads(node, r.sum(-1, keepdim=True)).mT
        keys = sum((rows_of[..., rows] @ signal.weights(node, rows)).squeeze(-2) for rows in node.blocks())
        assert isinstance(keys, Tensor)
        value = (keys[..., None] / node.value.shape[-1]).expand(*keys.shape, node.value.shape[-1])
    return node.to_value(value)


def residual(node: Sum, r: Tensor, signal: Flow) -> Grads:
    """All of r to the trunk, all of r to a branch that went through attention, nothing to one that did not.

    Rollout ignores branches without attention, such as an MLP.
    """
    if node in signal.terminals:
        r = signal.start(node, r)
    factors = signal.factors(node)
    trunk, attending = (r, r) if factors is None else (r * factors[0], r * factors[1])
    if node.trunk is None and not any(node.attends):
        # Siblings: several inputs added into one token each report its score, and so do attentions that make up one
        # branch; two branches of one input (a projected shortcut) or two read-outs averaged after the attentions share
        # it.
        inputs = node.tags[0].ancestors & node.tags[1].ancestors & INPUTS
        same = common_root(*node.tags) >= 0
        attentions = (
            node.tags[0].attention > 0 and not same and not (node.tags[0].carried | node.tags[1].carried) & INPUTS
        )
        share = r if attentions or (node.tags[0].attention == 0 and not inputs) else r / 2
        shares: list[Tensor | None] = [share, share]
    elif node.trunk is None and signal.trunk_only:
        shares = [r, r]  # two streams with attentions of their own: each brings its tokens' identity
    else:
        through = None if signal.trunk_only else attending
        shares = [trunk if i == node.trunk else through if node.attends[i] else None for i in (0, 1)]
        if node.fork is not None and not signal.trunk_only:
            take_second_identity(node, r, signal)
    sizes = (node.a.shape, node.b.shape)
    return tuple(None if s is None else unbroadcast(s, size) for s, size in zip(shares, sizes, strict=True))


def accumulation(node: Accumulation, r: Tensor, signal: Flow) -> Grads:
    """Equal shares to what is there."""
    features = (-1,) if node.layout is None else lay.feature_axes(node.layout)
    first, second = ((t != 0).any(features, keepdim=True) if features else t != 0 for t in (node.a, node.b))
    share = r / (first.to(r.dtype) + second.to(r.dtype)).clamp(min=1)
    return share * first, share * second


def uniform(node: Sum, r: Tensor) -> Tensor:
    """The same total per example, spread equally over the rows that have any: the read-out rows."""
    present = r != 0
    features = lay.feature_axes(node.layout)
    if features:
        present = present.any(features, keepdim=True).expand(r.shape)
    parts = node.per_sample(present).to(r.dtype)
    total = node.per_sample(r).sum((0, 2), keepdim=True)
    return (parts * (total / parts.sum((0, 2), keepdim=True).clamp(min=1))).reshape(r.shape)


def matrix_product(node: MatMul, r: Tensor, signal: Flow) -> Grads:
    """A product of two streams (image times text): each is explained in full.

    Of linear attention only the values are, as in a softmax attention.
    """
    width = node.a.shape[-1]
    a = (r.sum(-1, keepdim=True) / width).expand(*r.shape[:-1], width)
    b = (r.sum(-2, keepdim=True) / width).expand(*r.shape[:-2], width, r.shape[-1])
    first, second = node.split(a, b)
    return (first if node.values != 1 else None, second if node.values != 0 else None)


def identity(node: Node, r: Tensor, signal: Flow) -> Grads:
    return (r,)


def scaling(node: Scale, r: Tensor, signal: Flow) -> Grads:
    if isinstance(node.factor, Tensor):
        r = torch.where(node.factor == 0, 0, r)
    return (unbroadcast(r, node.x_shape),)


def product(node: Product, r: Tensor, signal: Flow) -> Grads:
    if node.signal is not None:
        return node.to_signal(r)
    share = share_of_two(node, r)
    return node.split(share, share)


def share_of_two(node: Node, r: Tensor) -> Tensor:
    """As in a matrix product: two streams (image times text) are explained in full, two views of one stream share."""
    first, second = (0 if tag is None else tag.ancestors & INPUTS for tag in node.sources)
    return r / 2 if first & second else r


def combined(node: Combined, r: Tensor, signal: Flow) -> Grads:
    share = share_of_two(node, r)
    return share, share


def constant_sum(node: ConstantSum, r: Tensor, signal: Flow) -> Grads:
    return (unbroadcast(r, node.x.shape),)


def centring(node: Centring, r: Tensor, signal: Flow) -> Grads:
    return r, None


def statistic(node: Statistic, r: Tensor, signal: Flow) -> Grads:
    return (node.spread(r),)


def embedding(node: Embedding, r: Tensor, signal: Flow) -> Grads:
    return (r.sum(-1),)


def joining(node: Join, r: Tensor, signal: Flow) -> Grads:
    """Follow the positions."""
    return node.gradient(r)


def custom(node: Custom, r: Tensor, signal: Flow) -> Grads:
    """What the user registered for the module."""
    return node.rule.send(node, r, node.rule.flow)


TABLE: dict[type[Node], Rule] = {
    Custom: custom,
    LinearMap: linear_map,
    Linear: linear,
    Attention: attention,
    Sum: residual,
    Accumulation: accumulation,
    MatMul: matrix_product,
    Softmax: identity,
    Norm: identity,
    Elementwise: identity,
    Scale: scaling,
    Product: product,
    ConstantSum: constant_sum,
    Centring: centring,
    Statistic: statistic,
    Embedding: embedding,
    Combined: combined,
    Join: joining,
}
