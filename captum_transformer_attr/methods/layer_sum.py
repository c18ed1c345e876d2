"""Methods that add up token scores of several layers and carry them along the residual trunk to the inputs."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_transformer_attr.errors import UnsupportedModelError
from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.flow.rollout import Passed, terminal_sums
from captum_transformer_attr.flow.token_flow import Flow
from captum_transformer_attr.methods.token_level import TokenAttribution
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.recording.node import Grads, Node
from captum_transformer_attr.recording.session import Recording
from captum_transformer_attr.recording.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class Deposit:
    """Token scores of one layer: ``scores`` has the shape of ``output``, a place in the graph, and its channel sum is
    a token's score."""

    output: Snapshot
    scores: Tensor


class LayerSumAttribution(TokenAttribution):
    """Base of the methods that score the tokens of every layer and add the layers up.

    The residual trunk says which token of the input a token of a layer is, so that class tokens fall away and merged
    patches share.
    """

    def deposits(self, recording: Recording, maps: Maps) -> list[Deposit]:
        """Token scores of the layers."""
        raise NotImplementedError

    def roll_out(
        self, recording: Recording, maps: Maps, leaves: list[Tensor], watched: Collection[Node]
    ) -> tuple[Passed, Passed]:
        found = self.deposits(recording, maps)
        signal = TrunkFlow({})
        signal.watched = watched
        arrived = recording.relay(signal, [d.output for d in found], [d.scores for d in found], leaves)
        refuse_lost(arrived, [d.scores for d in found], "the layers' tokens")
        zeros = [torch.zeros_like(leaf) for leaf in leaves]
        through = [z if r is None else r for r, z in zip(arrived, zeros, strict=True)]
        return Passed(through, signal.seen, signal.reached), Passed(zeros, {}, set())


def refuse_lost(arrived: Sequence[Tensor | None], sent: Sequence[Tensor], tokens: str) -> None:
    """A map of zeros must not stand for tokens that have no place in the input.

    Raises:
        UnsupportedModelError: if scores were sent and none arrived.
    """
    if any(bool(s.any()) for s in sent) and not any(r is not None and bool(r.any()) for r in arrived):
        raise UnsupportedModelError(
            f"{tokens} cannot be followed to the input along residual connections (attention without a residual merges "
            "them); "
            "use TransformerRelevance or AttentionRollout"
        )


class TrunkFlow(Flow):
    """Token flow along residual trunks only; an attention in ``added`` adds token scores of its own to its values'
    tokens."""

    def __init__(self, added: dict[Attention, Tensor]) -> None:
        super().__init__(lambda node, rows: node.probabilities(rows), [], [], trunk_only=True)
        self.added = added
        self.rules = {**self.rules, Attention: add_scores}


def add_scores(node: Attention, r: Tensor, signal: TrunkFlow) -> Grads:
    """Scores ``(..., keys)`` spread evenly over the values' channels."""
    if node not in signal.added:
        return node.to_value(torch.zeros_like(node.value))
    return node.to_value((signal.added[node][..., None] / node.value.shape[-1]).expand_as(node.value))


class ReadOutRows(Flow):
    """What the read-out rows attend to in every layer: a pass along the trunk that looks at each attention and sends
    nothing through it."""

    def __init__(self, recording: Recording) -> None:
        super().__init__(lambda node, rows: node.probabilities(rows), [], terminal_sums(recording))
        self.rows: dict[Attention, Tensor] = {}
        self.rules = {**self.rules, Attention: look}


def look(node: Attention, r: Tensor, signal: ReadOutRows) -> Grads:
    """Attention of the read-out rows per head, ``(..., heads, keys)``; a row's weight is shared by the heads, so that
    heads add up to their mean."""
    rows_of = r.sum(-1, keepdim=True).mT
    parts = ((rows_of[..., rows] @ node.probabilities(rows)).squeeze(-2) for rows in node.blocks())
    signal.rows[node] = functools.reduce(torch.add, parts)
    return node.to_value(torch.zeros_like(node.value))


def read_out_attention(recording: Recording) -> dict[Attention, Tensor]:
    """Every attention's read-out row averaged over heads, ``(..., keys)``; missing where the trunk leads to no
    read-out."""
    signal = ReadOutRows(recording)
    recording.send(signal, list(recording.inputs.leaves.values()))
    batch = recording.inputs.batch
    return {
        node: (rows if rows.ndim > 2 else rows.reshape(batch, -1, rows.shape[-1])).sum(-2)  # (B · H, keys)
        for node, rows in signal.rows.items()
    }


def of_blocks(recording: Recording, names: Sequence[str]) -> dict[str, list[Attention]]:
    """The attention calls inside each block."""
    return {n: [a for a in recording.attentions if a.path == n or a.path.startswith(f"{n}.")] for n in names}
