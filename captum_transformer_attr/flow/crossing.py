"""Token flow in models with cross-attention: relation matrices where streams ask each other, row vectors elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_transformer_attr.flow.bimodal import Relations, Weights
from captum_transformer_attr.flow.streams import Call, Stream
from captum_transformer_attr.flow.token_flow import Flow
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.ops.residual import Sum
from captum_transformer_attr.recording.node import Grads, Node
from captum_transformer_attr.recording.session import Recording


class StoppedFlow(Flow):
    """Token flow that stops at some attention calls and notes what their queries carry.

    stops: the calls. asked: what arrived there, ``(B, queries)``.
    """

    def __init__(
        self,
        weights: Weights,
        active: Collection[Attention],
        terminals: Collection[Sum],
        stops: Collection[Attention],
        batch: int,
    ) -> None:
        super().__init__(weights, active, terminals)
        self.stops, self.batch = set(stops), batch
        self.asked: dict[Attention, Tensor] = {}

    def send(self, node: Node, arriving: Tensor) -> Grads:
        if isinstance(node, Attention) and node in self.stops:
            self.asked[node] = arriving.sum(-1).reshape(self.batch, -1, arriving.shape[-2]).sum(1)
            return nothing(node)
        return super().send(node, arriving)


class Carry(Flow):
    """Brings scores of a stream's tokens, given over the keys of an attention call, down its residual trunk."""

    def __init__(self, given: dict[Attention, Tensor]) -> None:
        super().__init__(lambda node, rows: node.value, (), (), trunk_only=True)
        self.given = given

    def send(self, node: Node, arriving: Tensor) -> Grads:
        if isinstance(node, Attention) and node in self.given:
            return node.to_value(over_values(node, self.given[node]))
        return super().send(node, arriving)


def over_values(node: Attention, scores: Tensor) -> Tensor:
    """Scores ``(B, keys)`` as a signal of the values' shape, equal over heads and channels."""
    *lead, keys, channels = node.value.shape
    batch = scores.shape[0]
    heads = max(1, torch.Size(lead).numel() // batch)
    spread = (scores / (heads * channels)).to(node.value.dtype)[:, None, :, None]
    return spread.expand(batch, heads, keys, channels).reshape(node.value.shape)


def nothing(node: Attention) -> Grads:
    """No signal for any operand."""
    return (None,) * len(node.to_value(torch.zeros_like(node.value)))


def below(
    recording: Recording, calls: Sequence[Call], gained: dict[Stream, Tensor]
) -> tuple[list[GradientEdge], list[Tensor]]:
    """Relevance of streams' first tokens as signals at the tensors where the streams were born."""
    readers: dict[Attention, Tensor] = {}
    streams = []
    for stream, scores in gained.items():
        reader = next(call.attention for call in calls if call.key.stream is stream)
        readers[reader] = scores
        streams.append(stream)
    outputs = [recording.recorder.captured[node] for node in readers]
    edges = [GradientEdge(stream.birth, 0) for stream in streams if stream.birth is not None]
    signals = recording.relay(Carry(readers), outputs, [torch.zeros_like(t) for t in outputs], edges)
    arrived = [(edge, signal) for edge, signal in zip(edges, signals, strict=True) if signal is not None]
    return [edge for edge, _ in arrived], [signal for _, signal in arrived]


__all__ = ["Carry", "Relations", "StoppedFlow", "below"]
