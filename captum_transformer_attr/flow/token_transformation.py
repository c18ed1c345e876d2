"""Token flow weighted by how much attention and feed-forward layers transform tokens (Wu et al., CVPR 2024).

A layer that turns token e into ẽ has the weight w = (|ẽ| / |e|) · exp(cos(e, ẽ)) / mean_k exp(cos(e_k, ẽ_k)), one
number per token. Where tokens enter and leave a layer is read off the recorded graph: e is what the first linear map
on the way from the trunk into a branch reads, or the trunk's token itself; ẽ are the values of an attention, or what a
feed-forward branch adds to the trunk.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.flow.lineage import Function, Lineage, node_of, operands
from captum_transformer_attr.flow.padding import seen_keys
from captum_transformer_attr.flow.stream_finder import find_streams
from captum_transformer_attr.flow.streams import CROSS, SELF, Call
from captum_transformer_attr.flow.token_flow import Flow, Weights
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.ops.linear import Linear
from captum_transformer_attr.ops.residual import Sum
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording.node import LayoutLostError
from captum_transformer_attr.recording.session import Recording
from captum_transformer_attr.recording.tags import Tag

PROJECTION, TRUNK = "projection", "trunk"  # where a token enters a layer: behind the norm, or in front of it


@dataclass(frozen=True)
class Transformations:
    """Factors of the token flow.

    columns: for the columns of an attention's map, ``(..., 1, keys)``. trunks: for what a residual sum sends along its
    trunk, last axis 1. starts: for what enters the last attention's residual sum, from the feed-forward branches behind
    it.
    """

    columns: dict[Attention, Tensor] = field(default_factory=dict)
    trunks: dict[Sum, Tensor] = field(default_factory=dict)
    starts: dict[Sum, Tensor] = field(default_factory=dict)


class TransformationFlow(Flow):
    """Token flow through (diag(w_ffn) + I)(O diag(w) + I) of every block and through diag(|e⁰|); the weights it is
    given are O diag(w), the last of them times diag(|e⁰|)."""

    def __init__(
        self,
        weights: Weights,
        active: Collection[Attention],
        terminals: Collection[Sum],
        trunk_only: bool,
        found: Transformations,
    ) -> None:
        super().__init__(weights, active, terminals, trunk_only)
        self.found = found

    def start(self, node: Sum, r: Tensor) -> Tensor:
        # The read-out rows are levelled here; the branches that come after must not be levelled with them.
        return super().start(node, r) * self.found.starts.get(node, 1)

    def factors(self, node: Sum) -> tuple[Tensor, Tensor] | None:
        trunk = self.found.trunks.get(node)
        return None if trunk is None else (trunk, torch.ones_like(trunk))


def transformations(recording: Recording, entering: str, feed_forward: bool) -> Transformations:
    """The factors of a recording whose target was selected; see ``TokenTM`` for the options.

    Raises:
        InputError: for anything but blocks of self-attention and token-wise branches, each added to what it reads.
    """
    key = f"transformations {entering} {feed_forward}"
    if key not in recording.derived:
        recording.derived[key] = find(recording, entering, feed_forward)
    found: Transformations = recording.derived[key]
    return found


def find(recording: Recording, entering: str, feed_forward: bool) -> Transformations:
    calls, lineage = find_streams(recording).calls, Lineage(recording.selected)
    residuals = {call.update.update: residual_of(call) for call in calls}
    refuse_merged(calls)
    refuse_joined(lineage, residuals)
    found, batch = Transformations(), recording.inputs.batch
    shown: dict[Function, Tensor] = {}  # tokens that are not padding, by the update an attention leads to
    for call in calls:
        attention, residual = call.attention, residuals[call.update.update]
        real = shown[call.update.update] = seen_keys(attention).reshape(batch, -1, attention.map_shape[-1]).any(1)
        before = entered(recording, residual, attention.sources[-1], entering)
        factor = weight(
            before, concatenated(attention, batch), real, f"the value of the attention in module '{attention.path}'"
        )
        if call.trunk is not None and call.trunk.update is None:  # the first block, which C_0 stands below
            length = operand(residual, residual.trunk or 0, batch).norm(dim=-1)
            found.trunks[residual] = over_tokens(length, residual)
            factor = factor * length
        found.columns[attention] = over_columns(factor, attention)
    for node, end in feed_forwards(recording, lineage, residuals) if feed_forward else ():
        side = 1 - (node.trunk or 0)
        leaving, terminal = operand(node, side, batch), residuals[end]
        behind = not leads_to_attention(recording, node)
        if behind and leaving.shape[1] != shown[end].shape[1]:
            continue  # the head's own, on tokens that were read out
        before = entered(recording, node, node.tags[side], entering)
        factor = 1 + weight(before, leaving, shown[end], f"the branch that is added in module '{node.path}'")
        if behind:
            found.starts[terminal] = over_tokens(factor, terminal) * found.starts.get(terminal, 1)
        else:
            found.trunks[node] = over_tokens(factor, node)
    return found


def weight(before: Tensor, after: Tensor, real: Tensor, what: str) -> Tensor:
    """w = (|ẽ| / |e|) · NECC per token, ``(B, N)``; 0 where |e| is.

    NECC = exp(cos(e, ẽ)) over its mean over the tokens that are not padding.
    """
    if before.shape != after.shape:
        axis, name = (-1, "channels") if before.shape[1] == after.shape[1] else (1, "tokens")
        raise InputError(
            f"TokenTM: {what} has {after.shape[axis]} {name}, what it was made from {before.shape[axis]}: "
            "no correlation tells how tokens are transformed there; use AttentionRelevance"
        )
    correlation = F.cosine_similarity(before, after, -1).exp()
    correlation = correlation / ((correlation * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1))
    first, last = before.norm(dim=-1), after.norm(dim=-1)
    return torch.where(first == 0, 0, last / torch.where(first == 0, 1, first)) * correlation


# ---------------------------------------------------------------------- what the graph says
def residual_of(call: Call) -> Sum:
    """The sum in which an attention is added to the tokens that it reads."""
    node = node_of(call.update.update)
    if call.kind == CROSS:
        why = "asks other tokens than its own (cross-attention)"
    elif call.kind != SELF:
        why = "does not read its block's tokens as they are (windows, merged tokens)"
    elif not isinstance(node, Sum) or node.trunk is None or call.key != call.trunk:
        why = "is not added to the tokens that it reads"
    else:
        return node
    raise InputError(f"TokenTM: the attention in module '{call.attention.path}' {why}; use AttentionRelevance")


def refuse_merged(calls: list[Call]) -> None:
    """Tokens that are made anew from other tokens between blocks have no one matrix to be followed by."""
    made: dict[str, object] = {}
    for call in calls:
        for name in call.update.stream.inputs:
            if made.setdefault(name, call.update.stream) is not call.update.stream:
                raise InputError(
                    f"TokenTM: the attention in module '{call.attention.path}' reads other tokens of '{name}' than "
                    "those before it (merged or made anew); use AttentionRelevance"
                )


def refuse_joined(lineage: Lineage, residuals: Collection[Function]) -> None:
    """Every sum with an attention of its own is a residual: none of two branches, none around another residual."""
    for fn in lineage.lines:
        node = node_of(fn)
        if isinstance(node, Sum) and any(node.attends) and fn not in residuals:
            raise InputError(
                f"TokenTM: module '{node.path}' joins an attention with another branch (parallel branches, a residual "
                "around others); use AttentionRelevance"
            )


def feed_forwards(
    recording: Recording, lineage: Lineage, residuals: Mapping[Function, Sum]
) -> Iterator[tuple[Sum, Function]]:
    """The sums that add token-wise branches to the trunk, with the attention's update that they come after."""
    for fn in lineage.lines:
        node = node_of(fn)
        if not isinstance(node, Sum) or node.trunk is None or any(node.attends):
            continue
        below = [lineage.line(f).end for f in operands(fn)]
        end = below[node.trunk]
        # Sums within a branch (rotated queries and keys) lead to an attention, but to no later trunk.
        carried = any(residual.tag.carried >> node.tag.origin & 1 for residual in residuals.values())
        if end not in residuals or (leads_to_attention(recording, node) and not carried):
            continue
        if below[1 - node.trunk] is not end:
            raise InputError(
                f"TokenTM: the branch that is added in module '{node.path}' is no token-wise function of the tokens it "
                "is added to (convolution, experts, parallel branches); use AttentionRelevance"
            )
        yield node, end


def leads_to_attention(recording: Recording, node: Sum) -> bool:
    """Whether an attention follows on the way to the output."""
    return any(a.tag.comes_from(node.tag) for a in recording.attentions)


def entered(recording: Recording, node: Sum, branch: Tag | None, entering: str) -> Tensor:
    """e, ``(B, N, C)``: a residual's trunk, or what the first linear map on the way from it into the branch reads."""
    trunk = node.trunk or 0
    if entering == TRUNK:
        return operand(node, trunk, recording.inputs.batch)
    inside = 0 if branch is None else branch.ancestors & ~node.tags[trunk].ancestors
    for found in recording.nodes:
        if isinstance(found, Linear) and inside >> found.tag.origin & 1:
            source = found.sources[0]
            layout = None if source is None else source.layout
            return by_token(found.x, layout, recording.inputs.batch, found.path)
    raise InputError(
        f"TokenTM: no linear layer leads into the branch that is added in module '{node.path}'; use entering='trunk'"
    )


def concatenated(node: Attention, batch: int) -> Tensor:
    """ẽ of an attention: the values of all heads side by side, ``(B, N, H · d)``, as the call reads them: grouped heads
    are repeated."""
    tag = node.sources[-1]
    split = lay.sample_shape(None if tag is None else tag.layout, node.value.shape, batch)
    if split is None or split[0] != 1:
        raise LayoutLostError(node.path)
    tokens, channels = node.value.shape[-2:]
    values = node.value.expand(*node.map_shape[:-2], tokens, channels).reshape(batch, -1, tokens, channels)
    return values.transpose(1, 2).flatten(2)


def operand(node: Sum, position: int, batch: int) -> Tensor:
    """One operand of a residual sum, ``(B, N, C)``."""
    return by_token((node.a, node.b)[position], node.tags[position].layout, batch, node.path)


# ---------------------------------------------------------------------- axes
def by_token(x: Tensor, layout: lay.Layout | None, batch: int, path: str) -> Tensor:
    """A tensor with channels last as ``(B, N, C)``, wherever its examples are.

    Raises:
        LayoutLostError: if they cannot be told apart.
    """
    if lay.sample_shape(layout, x.shape, batch) is None:
        raise LayoutLostError(path)
    sizes, order = tokens_of(layout, x.shape)
    return x.reshape(*sizes, x.shape[-1]).permute(*order, len(sizes)).reshape(batch, -1, x.shape[-1])


def over_tokens(values: Tensor, node: Sum) -> Tensor:
    """Values ``(B, N)`` with the axes of a sum, the last one 1."""
    sizes, order = tokens_of(node.layout, node.shape)
    back = sorted(range(len(order)), key=order.__getitem__)
    return values.reshape([sizes[i] for i in order]).permute(back).reshape(*node.shape[:-1], 1)


def tokens_of(layout: lay.Layout | None, shape: torch.Size) -> tuple[list[int], list[int]]:
    """Sizes of all factors but the channels, and the order that puts the examples first."""
    if layout is None:  # one example
        return [math.prod(shape[:-1])], [0]
    factors = [factor for axis in layout[:-1] for factor in axis]
    return [size for _, size in factors], sorted(range(len(factors)), key=lambda i: factors[i][0] != lay.BATCH)


def over_columns(values: Tensor, node: Attention) -> Tensor:
    """Values ``(B, keys)`` for the columns of an attention's map, equal over heads and rows."""
    *lead, _, keys = node.map_shape
    heads = math.prod(lead) // len(values)
    return values[:, None].expand(-1, heads, -1).reshape(*lead, 1, keys)
