"""Token flow in models with cross-attention: relation matrices where streams ask each other, row vectors elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_transformer_attr.errors import UnsupportedModelError
from captum_transformer_attr.flow.bimodal import Weights
from captum_transformer_attr.flow.streams import Call, Stream
from captum_transformer_attr.flow.token_flow import Flow
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.ops.residual import Sum
from captum_transformer_attr.recording.node import Grads, Node
from captum_transformer_attr.recording.session import Recording


class StoppedFlow(Flow):
    """Token flow that stops at some attention calls and notes what their queries carry.

    Attributes:
        stops: the calls.
        asked: what arrived there, ``(B, queries)``.
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
        reader = next(call.attention for call in calls if call.key.stream is stream and reads_all(call))
        readers[reader] = scores
        streams.append(stream)
    outputs = [recording.recorder.captured[node] for node in readers]
    edges = [GradientEdge(stream.birth, 0) for stream in streams if stream.birth is not None]
    signals = recording.relay(Carry(readers), outputs, [output.zeros() for output in outputs], edges)
    arrived = [(edge, signal) for edge, signal in zip(edges, signals, strict=True) if signal is not None]
    return [edge for edge, _ in arrived], [signal for _, signal in arrived]


def reads_all(call: Call) -> bool:
    """Whether an attention call reads every token of the stream it asks."""
    return call.attention.map_shape[-1] == call.key.stream.tokens


def columns_read(recording: Recording, calls: Sequence[Call]) -> dict[Attention, Tensor]:
    """For calls that read only some tokens of a stream: which ones, ``(B, keys)``.

    Numbers sent from the keys down to the stream's birth, once from this call and once from one that reads all tokens,
    meet at the same elements there.
    """
    found = {}
    for call in calls:
        if not reads_all(call) and call.key.stream.birth is not None:
            whole = next(c for c in calls if c.key.stream is call.key.stream and reads_all(c))
            part, full = (numbers_at_birth(recording, c) for c in (call, whole))
            shared = part > 0
            keys, tokens = call.attention.map_shape[-1], whole.attention.map_shape[-1]
            index = torch.full((recording.inputs.batch * keys,), -1, device=part.device)
            index[part[shared] - 1] = (full[shared] - 1) % tokens
            if bool((index < 0).any()):
                raise UnsupportedModelError(f"module '{call.attention.path}': its keys cannot be traced back to tokens")
            found[call.attention] = index.reshape(-1, keys)
    return found


def numbers_at_birth(recording: Recording, call: Call) -> Tensor:
    """1, 2, … for the keys of all examples, as they arrive at the elements of the stream's birth; 0 where none does."""
    node, batch = call.attention, recording.inputs.batch
    keys = node.map_shape[-1]
    output, edge = recording.recorder.captured[node], GradientEdge(call.key.stream.birth, 0)  # type: ignore[arg-type]
    number = torch.arange(1, batch * keys + 1, device=node.value.device).reshape(batch, keys).to(node.value.dtype)
    one, many = (
        recording.relay(Carry({node: code}), [output], [output.zeros()], [edge])[0]
        for code in (torch.ones_like(number), number)
    )
    assert one is not None and many is not None
    return torch.where(one > 0, (many / torch.where(one > 0, one, 1)).round(), 0).long().flatten()
