"""Token flow corrected by the statistics of layer norms (Nguyen, Lee and Kim 2023, re-derived).

With attention A and deviations σ frozen, a pre-norm block is y_i = x_i + Σ_j (A_ij / σ_j) W x_j + const: how much of
token j arrives at i depends on the deviation that the norm divided it by. Statistics are relative: σ̂_j = σ_j / mean
over the example's tokens in that layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from captum_transformer_attr.flow.normalisation import row_sums
from captum_transformer_attr.flow.padding import real_tokens
from captum_transformer_attr.flow.token_flow import TABLE, Flow, Weights
from captum_transformer_attr.flow.token_flow import linear as flat_linear
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.ops.linear import Linear
from captum_transformer_attr.ops.norm import LayerNorm, Norm
from captum_transformer_attr.ops.product import NORMALISATION, Product
from captum_transformer_attr.ops.residual import Sum
from captum_transformer_attr.ops.shape import Join
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording.node import Grads, LayoutLostError, Node
from captum_transformer_attr.recording.session import Recording
from captum_transformer_attr.recording.signal import Rule

BEFORE, WITHIN, AFTER = "before", "within", "after"


@dataclass(frozen=True)
class BlockNorm:
    """The norm of one attention residual.

    In front of the attention (pre-norm), behind it in the branch (Swin-V2), or behind the sum (BERT).
    """

    norm: Node
    place: str
    attention: Attention


def block_norms(recording: Recording) -> dict[Sum, BlockNorm]:
    """The norm that belongs to every residual with an attention branch, read off the recorded graph."""
    norms = [
        n for n in recording.nodes if isinstance(n, LayerNorm) or (isinstance(n, Product) and n.kind == NORMALISATION)
    ]
    found: dict[Sum, BlockNorm] = {}
    for node in recording.nodes:
        if not isinstance(node, Sum) or node.trunk is None or not any(node.attends):
            continue
        trunk, branch = node.tags[node.trunk], node.tags[1 - node.trunk]
        inside = branch.ancestors & ~trunk.ancestors
        attention = next((a for a in recording.attentions if inside >> a.tag.origin & 1), None)
        if attention is None:
            continue
        for norm in norms:
            source = norm.sources[0]
            if inside >> norm.tag.origin & 1 and source is not None and source.origin == trunk.origin:
                found[node] = BlockNorm(norm, BEFORE, attention)
            elif node not in found and inside >> norm.tag.origin & 1 and norm.tag.ancestors >> attention.tag.origin & 1:
                found[node] = BlockNorm(norm, WITHIN, attention)
            elif node not in found and source is not None and source.origin == node.tag.origin:
                found[node] = BlockNorm(norm, AFTER, attention)
    return found


def merging_layers(recording: Recording) -> set[Linear]:
    """Linear layers that read several tokens' channels at once.

    Patch merging, written as a reshape or as a concatenation of slices.
    """
    by_origin = {node.tag.origin: node for node in recording.nodes}
    found = set()
    for node in recording.nodes:
        source = node.sources[0] if isinstance(node, Linear) else None
        if not isinstance(node, Linear) or source is None or source.layout is None:
            continue
        last = lay.labels(source.layout)[-1]
        before = by_origin.get(source.origin)
        while isinstance(before, Norm) and before.sources[0] is not None:
            before = by_origin.get(before.sources[0].origin)
        joined = isinstance(before, Join) and len(before.leaves) > 1 and before.y.shape[-1] > before.leaves[0].shape[-1]
        if joined or (lay.FEATURE in last and len(last) > 1):
            found.add(node)
    return found


def deviation(norm: Node) -> Tensor:
    """Standard deviation over channels of every token (root mean square for an RMS norm), last axis 1."""
    if isinstance(norm, Norm):
        return norm.deviation()
    assert isinstance(norm, Product)
    return norm.b if norm.divide else norm.b.reciprocal()


def relative_deviation(block: BlockNorm) -> Tensor:
    """σ̂: deviations over their mean over the example's tokens; padding takes no part in the mean."""
    sigma = deviation(block.norm)
    shape = lay.sample_shape(block.norm.layout, sigma.shape, block.norm.recorder.batch)
    if shape is None:
        raise LayoutLostError(block.norm.path)
    present = torch.ones_like(sigma)
    calls = [node for node in block.norm.recorder.nodes if isinstance(node, Attention)]
    if block.norm.layout is not None:
        real = real_tokens((*block.norm.layout[:-1], ()), [block.attention, *calls])
        present = present if real is None else real.expand_as(sigma).to(sigma.dtype)
    outer = (sigma * present).reshape(shape).sum((0, 2), keepdim=True) / present.reshape(shape).sum(
        (0, 2), keepdim=True
    )
    return sigma / outer.expand(shape).reshape(sigma.shape)


@dataclass(frozen=True)
class Correction:
    """How layer-norm statistics correct the token flows of one recording.

    Attributes:
        blocks: see ``block_norms``.
        side: ``"key"`` divides the keys' share, r ← r + (r Ā) / σ̂; ``"query"`` the queries', r ← r + (r / σ̂) Ā;
            ``"row"`` uses the row-normalised diag(σ̂) + Ā; ``"none"`` leaves the statistics out. A norm within the
            branch (Swin-V2) or behind the sum (BERT) divides what passes it.
        neutral: put 1 in the place of every σ̂.
        merging_layers: layers that share a parent's relevance among its children by the size of their activations;
            others share it equally.
        starts: share of every token at the last residual, uniform where there is none.
        sigmas: σ̂ of the norms that were asked for.
    """

    blocks: Mapping[Sum, BlockNorm]
    side: str
    neutral: bool = False
    merging_layers: Collection[Linear] = ()
    starts: Mapping[Sum, Tensor] = field(default_factory=dict)
    sigmas: dict[Node, Tensor] = field(default_factory=dict)

    def sigma(self, block: BlockNorm) -> Tensor:
        """σ̂ of a block's norm."""
        if block.norm not in self.sigmas:
            sigma = relative_deviation(block)
            self.sigmas[block.norm] = torch.ones_like(sigma) if self.neutral else sigma
        return self.sigmas[block.norm]


class StatisticsFlow(Flow):
    """Token flow in which layer norms of attention residuals divide by σ̂."""

    def __init__(
        self,
        weights: Weights,
        active: Collection[Attention],
        terminals: Collection[Sum],
        trunk_only: bool,
        correction: Correction,
    ) -> None:
        super().__init__(weights, active, terminals, trunk_only)
        self.rules, self.correction = RULES, correction
        # In front of an attention only the branch is divided; elsewhere everything that passes the norm.
        self.dividing = {
            block.norm: block
            for block in correction.blocks.values()
            if correction.side != "none"
            and (trunk_only or block.attention in self.active)
            and (block.place != BEFORE or correction.side == "key")
        }

    def start(self, node: Sum, r: Tensor) -> Tensor:
        r = super().start(node, r)
        if node not in self.correction.starts:
            return r
        weights = torch.where(r != 0, self.correction.starts[node].expand(r.shape), 0)
        total = node.per_sample(r).sum((0, 2), keepdim=True)
        sums = node.per_sample(weights).sum((0, 2), keepdim=True)
        # Where no token speaks for the class at all, every read-out row counts the same.
        scaled = node.per_sample(weights) * (total / torch.where(sums == 0, 1, sums))
        return torch.where(sums == 0, node.per_sample(r), scaled).reshape(r.shape)

    def factors(self, node: Sum) -> tuple[Tensor, Tensor] | None:
        block, side = self.correction.blocks.get(node), self.correction.side
        if block is None or block.place != BEFORE or side not in ("query", "row") or block.attention not in self.active:
            return None
        sigma = self.correction.sigma(block)
        if side == "query":
            return torch.ones_like(sigma), 1 / sigma
        rows = sigma + row_sums(node, self)
        return sigma / rows, 1 / rows


def norm(node: Norm, r: Tensor, signal: StatisticsFlow) -> Grads:
    block = signal.dividing.get(node)
    return (r if block is None else r / signal.correction.sigma(block),)


def product(node: Product, r: Tensor, signal: StatisticsFlow) -> Grads:
    """An RMS norm written by hand divides like any other."""
    block = signal.dividing.get(node)
    if block is not None:
        r = r / signal.correction.sigma(block)
    return TABLE[Product](node, r, signal)


def linear(node: Linear, r: Tensor, signal: StatisticsFlow) -> Grads:
    """A merging layer may favour its more active children.

    Any other layer is token-wise, so that channels do not matter.
    """
    if node not in signal.correction.merging_layers:
        return flat_linear(node, r, signal)
    size = node.x.abs()
    total = size.sum(-1, keepdim=True)
    return (
        r.sum(-1, keepdim=True) * torch.where(total == 0, 1 / size.shape[-1], size / torch.where(total == 0, 1, total)),
    )


RULES: dict[type[Node], Rule] = {**TABLE, Norm: norm, Product: product, Linear: linear}
