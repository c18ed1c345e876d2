"""What was recorded on the way, for researchers.

Attention maps, their gradients and relevance, and the relevance of every block's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor

from captum_transformer_attr.flow.maps import Maps, by_example, whole
from captum_transformer_attr.flow.stream_finder import find_streams
from captum_transformer_attr.flow.streams import Call
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording.session import Recording
from captum_transformer_attr.recording.snapshot import Place, Snapshot
from captum_transformer_attr.recording.tags import Tag
from captum_transformer_attr.rules.deep_taylor import deep_taylor


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """One attention call.

    Attributes:
        name: path of the module that computed it.
        attention, gradient, relevance: ``(B, H, N, N')`` after softmax, rows are queries (windows of a hierarchical
            model count as examples: ``(B · windows, H, n, n)``); gradient of the selected output, relevance under
            ``deep_taylor`` taken after the half and before the softmax (None for methods that propagate none).
        query_stream, key_stream: the token streams that ask and are asked, called after the inputs their tokens come
            from, ``queries`` for learned ones.
    """

    name: str
    attention: Tensor
    gradient: Tensor
    relevance: Tensor | None
    query_stream: str
    key_stream: str


@dataclass(frozen=True, eq=False)
class AttentionRecords(Sequence[AttentionRecord]):
    """The attention calls of one forward in execution order.

    Attributes:
        relevance_by_layer: module path of every block → relevance of its output's tokens ``(B, N)``.
        parameter_share: module path → share of each example's relevance ``(B,)`` that its parameters took (class
            tokens, positional embeddings).
    """

    records: tuple[AttentionRecord, ...]
    relevance_by_layer: dict[str, Tensor] = field(default_factory=dict)
    parameter_share: dict[str, Tensor] = field(default_factory=dict)

    @overload
    def __getitem__(self, index: int) -> AttentionRecord: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[AttentionRecord, ...]: ...
    def __getitem__(self, index: int | slice) -> AttentionRecord | tuple[AttentionRecord, ...]:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)


def collect_records(recording: Recording, with_relevance: bool) -> AttentionRecords:
    """One gradient pass and, if asked for, one relevance pass down to the inputs."""
    maps = Maps(recording, recording.attentions)
    maps.collect_gradients()
    by_layer: dict[str, Tensor] = {}
    share: dict[str, Tensor] = {}
    if with_relevance:
        blocks = block_outputs(recording)
        absorbed: dict[str, Tensor] = {}
        wrt: list[Place] = [*blocks.values(), *recording.inputs.leaves.values()]
        arrived = maps.collect_relevance(deep_taylor(), wrt, absorbed)
        by_layer = {path: per_token(r, t.tag) for (path, t), r in zip(blocks.items(), arrived, strict=False)}
        share = {path: r.to(recording.selected.dtype) for path, r in absorbed.items() if bool(r.any())}
    batch = recording.inputs.batch
    calls = {call.attention: call for call in find_streams(recording).calls}
    records = tuple(record_of(calls[node], maps, batch, with_relevance) for node in recording.attentions)
    return AttentionRecords(records, by_layer, share)


def record_of(call: Call, maps: Maps, batch: int, with_relevance: bool) -> AttentionRecord:
    node = call.attention
    rows = whole(node)
    probability = node.probabilities(rows)
    relevance = maps.relevance(node, rows, probability) if with_relevance else None
    found = (probability, maps.gradient(node, rows), relevance)
    attention, gradient, relevance = (None if t is None else by_example(node, t, batch).clone() for t in found)
    assert attention is not None and gradient is not None
    query, key = call.streams
    return AttentionRecord(node.path, attention, gradient, relevance, query, key)


def stream_of(recording: Recording, tag: Tag | None) -> str:
    """The explained inputs a tensor was computed from, joined by ``+``; ``parameters`` for learned queries."""
    names = [name for i, name in enumerate(recording.inputs.explained) if tag is not None and tag.ancestors >> i & 1]
    return "+".join(names) or "parameters"


def block_outputs(recording: Recording) -> dict[str, Snapshot]:
    """Outputs of the modules that stand in a list and contain an attention: the blocks.

    A block called twice counts as ``path#2``.
    """
    used = {node.path for node in recording.attentions}
    calls = {
        path: outputs
        for path, outputs in recording.recorder.list_outputs.items()
        if any(p == path or p.startswith(f"{path}.") for p in used)
    }
    return {
        path if k == 0 else f"{path}#{k + 1}": output
        for path, outputs in calls.items()
        for k, output in enumerate(outputs)
        if output is not None
    }


def per_token(r: Tensor, tag: Tag | None) -> Tensor:
    """Sum over channels: ``(B, N)``."""
    axes = lay.feature_axes(tag.layout) if tag else ()
    summed = r.sum(axes or (-1,))
    shape = lay.sample_shape(lay.without(tag.layout, axes or (-1,)) if tag else None, summed.shape, r.shape[0])
    if shape is not None and shape[0] > 1:  # sequence first
        return summed.reshape(shape).transpose(0, 1).flatten(1)
    return summed.flatten(1) if summed.ndim > 1 else summed[:, None]


def join_records(results: list[AttentionRecords]) -> AttentionRecords:
    """Records of single examples as one batch."""

    def cat(tensors: list[Tensor | None]) -> Tensor | None:
        return None if tensors[0] is None else torch.cat([t for t in tensors if t is not None])

    first = results[0]
    records = tuple(
        AttentionRecord(
            r.name,
            torch.cat([x[i].attention for x in results]),
            torch.cat([x[i].gradient for x in results]),
            cat([x[i].relevance for x in results]),
            r.query_stream,
            r.key_stream,
        )
        for i, r in enumerate(first)
    )
    layers = {path: torch.cat([x.relevance_by_layer[path] for x in results]) for path in first.relevance_by_layer}
    shares = {path: torch.cat([x.parameter_share[path] for x in results]) for path in first.parameter_share}
    return AttentionRecords(records, layers, shares)
