"""Token flow: relevance per token, sent from the output to the inputs through attention maps and residual trunks.

The signal is any tensor whose channel sum is a token's relevance. One row of the product (Ā_L + I) ··· (Ā_1 + I) is what arrives, for whatever
geometry the graph has: windows, shifts, mergings and class tokens are ordinary views of the recorded forward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from captum_transformer_attr.errors import InputError, UnsupportedOperationError
from captum_transformer_attr.ops.attention import Attention, Softmax
from captum_transformer_attr.ops.bilinear import MatMul, unbroadcast
from captum_transformer_attr.ops.elementwise import Elementwise, Scale
from captum_transformer_attr.ops.embedding import Embedding
from captum_transformer_attr.ops.linear import Linear, LinearMap
from captum_transformer_attr.ops.norm import Centring, Norm, Statistic
from captum_transformer_attr.ops.product import Product
from captum_transformer_attr.ops.residual import ConstantSum, Sum
from captum_transformer_attr.ops.shape import Join
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording.node import Grads, LayoutLostError, Node
from captum_transformer_attr.rules.table import Rule, Signal

Weights = Callable[[Attention, slice], Tensor]


class Flow(Signal):
    """Token flow with attention weights from ``weights(node, rows)``: Ā per head, ``(..., rows, keys)``; heads are averaged by the flow itself.

    active: the attentions whose weights are used; the others count as identity. None of them (``trunk_only``) leaves the pure residual trunk,
    which is subtracted to take the identity term of the read-out rows out.
    terminals: the sums after which no attention follows; the read-out rows found there are weighted uniformly.
    normalize: divide the rows of (Ā + I) by their sums.
    doubled: what earlier flow sent into branches that have a residual trunk of their own; that trunk's share is a second identity and is part
    of the ``trunk_only`` flow.
    """

    def __init__(
        self,
        weights: Weights,
        active: Collection[Attention],
        terminals: Collection[Sum],
        trunk_only: bool = False,
        normalize: bool = False,
        doubled: Mapping[Sum, Tensor] | None = None,
    ) -> None:
        super().__init__("flow", "flow", TABLE)
        self.normalize = normalize
        self.nested: dict[Sum, Tensor] = {}
        self.doubled = doubled or {}
        self.weights, self.active, self.terminals, self.trunk_only = weights, set(active), set(terminals), trunk_only
        self.seen: dict[Node, Tensor] = {}
        self.watched: Collection[Node] = ()

    def send(self, node: Node, arriving: Tensor) -> Grads:
        if node in self.watched:
            self.seen[node] = arriving
        return super().send(node, arriving)


def linear_map(node: LinearMap, r: Tensor, signal: Flow) -> Grads:
    """Token-wise or local: a token's total is shared equally among what it was computed from."""
    return (node.spread(r),)


def linear(node: Linear, r: Tensor, signal: Flow) -> Grads:
    if node.mixes_tokens:
        raise UnsupportedOperationError(
            f"module '{node.path}' mixes tokens by a linear layer over the token axis: token relevance cannot follow attention alone there. "
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
        rows_of = r.sum(-1, keepdim=True)
        keys = sum(signal.weights(node, rows).mul(rows_of[..., rows, :]).sum(-2) for rows in node.blocks())
        assert isinstance(keys, Tensor)
        value = (keys[..., None] / node.value.shape[-1]).expand(*keys.shape, node.value.shape[-1])
    return node.to_value(value)


def residual(node: Sum, r: Tensor, signal: Flow) -> Grads:
    """All of r to the trunk, all of r to a branch that went through attention, nothing to one that did not (an MLP): rollout ignores those."""
    if node in signal.terminals:
        r = uniform(node, r)
    if signal.normalize and any(node.attends):
        r = r / (1 + row_sums(node, signal))
    if node.trunk is None and not any(node.attends):
        # Siblings: several inputs added into one token each report its score; two read-outs averaged after the attentions share it.
        share = r if node.tags[0].attention == 0 else r / 2
        shares: list[Tensor | None] = [share, share]
    else:
        shares = [r if i == node.trunk or (node.attends[i] and not signal.trunk_only) else None for i in (0, 1)]
        if any(node.nested):
            signal.nested[node] = r
            branch = None if node.trunk is None else 1 - node.trunk
            if node in signal.doubled and branch is not None:
                shares[branch] = signal.doubled[node]
    sizes = (node.a.shape, node.b.shape)
    return tuple(None if s is None else unbroadcast(s, size) for s, size in zip(shares, sizes, strict=True))


def row_sums(node: Sum, signal: Flow) -> Tensor:
    """Row sums of Ā of the attention that joins the trunk here, one per token, shaped to broadcast against the sum."""
    branch = node.tags[0 if node.attends[0] and node.trunk != 0 else 1]
    before = 0 if node.trunk is None else node.tags[node.trunk].ancestors
    joining = [a for a in signal.active if (branch.ancestors & ~before) >> a.tag.origin & 1]
    if not joining:
        return torch.zeros((), dtype=node.a.dtype, device=node.a.device)
    total: Tensor | None = None
    for a in joining:
        sums = torch.cat([signal.weights(a, rows).sum(-1) for rows in a.blocks()], -1)
        part = None if a.layout is None or node.layout is None else lay.aligned(sums, a.layout[:-1], node.layout)
        if part is None:
            if node.recorder.batch > 1 and (a.layout is None or node.layout is None):
                raise LayoutLostError(a.path)
            raise InputError(f"normalize=True: the rows of the attention in module '{a.path}' cannot be matched with the tokens of its residual")
        total = part if total is None else total + part
    assert total is not None
    return total


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
    """A product of two streams (image times text): each is explained in full."""
    width = node.a.shape[-1]
    a = (r.sum(-1, keepdim=True) / width).expand(*r.shape[:-1], width)
    b = (r.sum(-2, keepdim=True) / width).expand(*r.shape[:-2], width, r.shape[-1])
    return node.split(a, b)


def identity(node: Node, r: Tensor, signal: Flow) -> Grads:
    return (r,)


def scaling(node: Scale, r: Tensor, signal: Flow) -> Grads:
    if isinstance(node.factor, Tensor):
        r = torch.where(node.factor == 0, 0, r)
    return (unbroadcast(r, node.x_shape),)


def product(node: Product, r: Tensor, signal: Flow) -> Grads:
    return node.split(r / 2, r / 2) if node.signal is None else node.to_signal(r)


def constant_sum(node: ConstantSum, r: Tensor, signal: Flow) -> Grads:
    return (unbroadcast(r, node.x.shape),)


def centring(node: Centring, r: Tensor, signal: Flow) -> Grads:
    return r, None


def nothing(node: Statistic, r: Tensor, signal: Flow) -> Grads:
    return (None,)


def embedding(node: Embedding, r: Tensor, signal: Flow) -> Grads:
    return (r.sum(-1),)


def joining(node: Join, r: Tensor, signal: Flow) -> Grads:
    """Follow the positions."""
    return node.gradient(r)


TABLE: dict[type[Node], Rule] = {
    LinearMap: linear_map,
    Linear: linear,
    Attention: attention,
    Sum: residual,
    MatMul: matrix_product,
    Softmax: identity,
    Norm: identity,
    Elementwise: identity,
    Scale: scaling,
    Product: product,
    ConstantSum: constant_sum,
    Centring: centring,
    Statistic: nothing,
    Embedding: embedding,
    Join: joining,
}
