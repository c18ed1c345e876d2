"""Rows of (Ā + I) at a residual sum: their sums, and identities that would count twice."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_transformer_attr.errors import UnsupportedOperationError
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.ops.bilinear import unbroadcast
from captum_transformer_attr.ops.residual import Sum
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording.recorder import Recorder

if TYPE_CHECKING:
    from captum_transformer_attr.flow.token_flow import Flow


def take_second_identity(node: Sum, r: Tensor, signal: Flow) -> None:
    """A branch with a residual of its own brings the trunk's tokens a second time.

    So do MobileBERT's bottleneck and MViT's pooled queries.

    Of the branch only what passed an attention counts, so its trunk-only flow is computed aside and taken away where
    trunk and branch fork.
    """
    recorder = node.recorder
    assert node.fork is not None and node.branch is not None
    with recorder.sending(signal.along_trunk()):
        (second,) = torch.autograd.grad(
            node.branch,
            (recorder.edges[node.fork],),
            unbroadcast(r, node.branch.shape),
            retain_graph=True,
            allow_unused=True,
        )
    if second is not None:
        signal.corrections[node.fork] = signal.corrections.get(node.fork, 0) + second


def row_sums(node: Sum, signal: Flow) -> Tensor:
    """Row sums of Ā of the attentions that join the trunk here, per token.

    Of the sum's shape and equal over channels.
    """
    branch = node.tags[0 if node.attends[0] and node.trunk != 0 else 1]
    before = 0 if node.trunk is None else node.tags[node.trunk].ancestors
    total = node.a.new_zeros(())
    for a in signal.active:
        if (branch.ancestors & ~before) >> a.tag.origin & 1:
            sums = torch.cat([signal.weights(a, rows).sum(-1) for rows in a.blocks()], -1)
            total = total + carried_forward(node, a, over_heads(a, sums[..., None])[..., 0], signal.without_attention())
    return total


def carried_forward(node: Sum, a: Attention, values: Tensor, signal: Flow) -> Tensor:
    """Values of the attention's query rows ``(..., rows)`` at the tokens of the residual sum behind it, head means.

    The flow from the sum back to the attention's output is linear in what is sent; its transpose carries values the
    other way, through whatever windows, shifts and heads lie between. An attention within the stream that is asked (an
    encoder, the other modality) reaches the sum through another attention only: its rows are none of the sum's, and 0
    is returned.
    """
    recorder = node.recorder
    with recorder.sending(signal), torch.enable_grad():
        probe = torch.zeros(node.shape, dtype=values.dtype, device=values.device, requires_grad=True)
        (arrived,) = torch.autograd.grad(
            recorder.captured[node].edge, recorder.captured[a].edge, probe, create_graph=True, allow_unused=True
        )
        if arrived is None:
            return values.new_zeros(())
        result = None
        if arrived.requires_grad:
            (result,) = torch.autograd.grad(
                arrived.sum(-1), probe, values.expand(arrived.shape[:-1]), allow_unused=True
            )
    if result is None:  # what arrived does not depend on what was sent
        if not any(b.tag.comes_from(a.tag) and node.tag.comes_from(b.tag) for b in other_attentions(recorder, a)):
            raise UnsupportedOperationError(
                f"the rows of the attention in module '{a.path}' cannot be followed to module '{node.path}', so they "
                "cannot be normalised. "
                f"Way out: normalize=False."
            )
        return values.new_zeros(())
    return result


def other_attentions(recorder: Recorder, other_than: Attention) -> list[Attention]:
    """The other attention calls of a recording."""
    return [n for n in recorder.captured if isinstance(n, Attention) and n is not other_than]


def over_heads(node: Attention, values: Tensor) -> Tensor:
    """Values ``(..., rows, 1)`` with the mean over heads in the place of every head.

    Without projections beside the attention, a token's channels are the heads' own, and Ā = E_h would not mix them.
    """
    lead = [] if node.layout is None else [factor for factors in node.layout[:-2] for factor in factors]
    heads = [i for i, (label, _) in enumerate(lead) if label == lay.FEATURE]
    if not heads or values.shape[:-2].numel() != math.prod(size for _, size in lead):
        return values
    apart = values.reshape(*(size for _, size in lead), *values.shape[-2:])
    return apart.mean(heads, keepdim=True).expand_as(apart).reshape(values.shape)
