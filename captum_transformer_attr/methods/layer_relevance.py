"""Relevance block by block: residual stream, attention heads, MLP. For head pruning, relevance patching and depth
studies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor

from captum_transformer_attr.flow.maps import by_example
from captum_transformer_attr.methods.propagation import Start
from captum_transformer_attr.methods.records import block_outputs, per_token
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.ops.elementwise import Scale
from captum_transformer_attr.ops.norm import Norm
from captum_transformer_attr.ops.residual import Sum
from captum_transformer_attr.recording.node import Grads, Node
from captum_transformer_attr.recording.session import Recording
from captum_transformer_attr.recording.signal import Signal
from captum_transformer_attr.recording.snapshot import Place, Snapshot
from captum_transformer_attr.recording.tags import Tag


@dataclass(frozen=True, eq=False)
class BlockRelevance:
    """Relevance at one block.

    Attributes:
        name: module path; ``path#2`` for the second call of a shared block.
        stream: ``(B, N)`` relevance of the residual stream that leaves the block.
        heads: path of every attention in the block → ``(B, H, N)`` relevance of each head's output, by query token
            (windows of a hierarchical model count as examples).
        attention, mlp: ``(B, N)`` relevance of the branches that were added to the stream, None where there is none.
    """

    name: str
    stream: Tensor
    heads: dict[str, Tensor]
    attention: Tensor | None
    mlp: Tensor | None


@dataclass(frozen=True, eq=False)
class LayerRelevance(Sequence[BlockRelevance]):
    """The blocks in execution order. ``by_name`` finds one; ``head_scores`` is what pruning studies rank."""

    blocks: tuple[BlockRelevance, ...] = field(default=())

    @overload
    def __getitem__(self, index: int) -> BlockRelevance: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[BlockRelevance, ...]: ...
    def __getitem__(self, index: int | slice) -> BlockRelevance | tuple[BlockRelevance, ...]:
        return self.blocks[index]

    def __len__(self) -> int:
        return len(self.blocks)

    def by_name(self, name: str) -> BlockRelevance:
        """The block with this module path.

        Raises:
            KeyError: naming the blocks there are.
        """
        for block in self.blocks:
            if block.name == name:
                return block
        raise KeyError(f"no block {name!r}; blocks: {', '.join(block.name for block in self.blocks)}")

    def head_scores(self) -> dict[str, Tensor]:
        """Relevance of every head, summed over tokens: attention path (``path#2`` for a second call) → ``(B, H)``."""
        scores: dict[str, Tensor] = {}
        for block in self.blocks:
            for path, heads in block.heads.items():
                totals = heads.sum(-1)
                name = path + "".join(block.name.partition("#")[1:])
                scores[name] = totals.reshape(block.stream.shape[0], -1, totals.shape[-1]).sum(1)
        return scores


class Watched(Signal):
    """A table that remembers what arrived at some operations and what their rules sent on."""

    def __init__(self, table: Signal, nodes: set[Node]) -> None:
        super().__init__(table.name, table.carries, table.rules)
        self.table, self.nodes = table, nodes
        self.arrived: dict[Node, Tensor] = {}
        self.sent: dict[Node, Grads] = {}

    def send(self, node: Node, arriving: Tensor) -> Grads:
        result = self.table.send(node, arriving)
        if node in self.nodes:
            self.arrived[node], self.sent[node] = arriving, result
        return result


def layer_relevance(recording: Recording, table: Signal, start: Start) -> LayerRelevance:
    """One backward pass to the inputs, read off at every block's output, attention and residual sum."""
    outputs = innermost(block_outputs(recording))
    by_origin = {node.tag.origin: node for node in recording.nodes}
    chains = {name: residual_chain(output, by_origin, call_of(name)[0]) for name, output in outputs.items()}
    inner = {b for chain in chains.values() for total in chain for b in branch_sums(total)}
    signal = Watched(table, {*recording.attentions, *inner})
    wrt: list[Place] = [*outputs.values(), *recording.inputs.leaves.values()]
    arrived = recording.send(signal, wrt, start.signal, start.source)
    blocks = []
    for (name, output), g in zip(outputs.items(), arrived, strict=False):
        stream = per_token(output.value * g if table.carries == "gradient" else g, output.tag)
        heads = {a.path: head_relevance(a, signal, recording) for a in attentions_of(recording, name, outputs)}
        attention, mlp = branch_relevance(chains[name], signal)
        blocks.append(BlockRelevance(name, stream, heads, attention, mlp))
    return LayerRelevance(tuple(blocks))


def innermost(outputs: dict[str, Snapshot]) -> dict[str, Snapshot]:
    """Blocks that contain no other block (a stage is not one), in execution order."""
    paths = {call_of(name)[0] for name in outputs}
    outer = {path for path in paths if any(other.startswith(f"{path}.") for other in paths)}
    inner = {name: output for name, output in outputs.items() if call_of(name)[0] not in outer}
    return dict(sorted(inner.items(), key=lambda item: origin_of(item[1])))


def call_of(name: str) -> tuple[str, int]:
    """Module path and number of the call, from ``path#2``."""
    path, _, number = name.partition("#")
    return path, int(number or 1)


def is_inside(node: Node, path: str) -> bool:
    return node.path == path or node.path.startswith(f"{path}.")


def attentions_of(recording: Recording, name: str, outputs: dict[str, Snapshot]) -> list[Attention]:
    """The attention calls of one block call: after the block's previous call, before its own output."""
    path, number = call_of(name)
    earlier = "" if number == 1 else path if number == 2 else f"{path}#{number - 1}"
    after = origin_of(outputs[earlier]) if earlier else -1
    return [a for a in recording.attentions if is_inside(a, path) and after < a.tag.origin <= origin_of(outputs[name])]


def origin_of(output: Snapshot) -> int:
    return output.tag.origin if output.tag is not None else -1


def residual_chain(output: Snapshot, by_origin: dict[int, Node], path: str) -> list[Sum]:
    """The sums on the trunk that leads to a block's output, back to where the trunk enters the block."""
    chain: list[Sum] = []
    node = by_origin.get(origin_of(output))
    while node is not None and is_inside(node, path):
        source: Tag | None = node.sources[0]
        if isinstance(node, Sum):
            if node.trunk is None:
                break
            chain.append(node)
            source = node.tags[node.trunk]
        elif not isinstance(node, (Norm, Scale)):
            break
        node = by_origin.get(source.origin) if source is not None else None
    return chain


def branch_sums(total: Sum) -> list[Sum]:
    """Where the branches of one residual sum are added: in it, or before it where parallel branches are added to each
    other first."""
    assert total.trunk is not None
    added = total.tags[1 - total.trunk].sum_of
    return [added] if isinstance(added, Sum) and added.trunk is None and any(added.attends) else [total]


def branch_relevance(chain: list[Sum], signal: Watched) -> tuple[Tensor | None, Tensor | None]:
    """Relevance ``(B, N)`` of the branches that went through attention, and of the others."""
    parts: dict[bool, Tensor] = {}
    for node in (b for total in chain for b in branch_sums(total)):
        if node not in signal.sent:
            continue
        for i, value in enumerate((node.a, node.b)):
            sent = signal.sent[node][i]
            if i != node.trunk and sent is not None:
                r = per_token(value * sent if signal.carries == "gradient" else sent, node.tags[i])
                parts[node.attends[i]] = parts[node.attends[i]] + r if node.attends[i] in parts else r
    return parts.get(True), parts.get(False)


def head_relevance(node: Attention, signal: Watched, recording: Recording) -> Tensor:
    """Relevance of each head's output by query token, ``(B, H, N)``."""
    y: Tensor = node.y  # type: ignore[attr-defined]
    arrived = signal.arrived.get(node, torch.zeros_like(y))
    r = arrived * y if signal.carries == "gradient" else arrived
    return by_example(node, r, recording.inputs.batch).sum(-1)


def join_layer_relevance(results: list[LayerRelevance]) -> LayerRelevance:
    """Results of single examples as one batch."""

    def cat(parts: list[Tensor | None]) -> Tensor | None:
        present = [p for p in parts if p is not None]
        return torch.cat(present) if present else None

    blocks = []
    for same in zip(*results, strict=True):
        heads = {path: torch.cat([b.heads[path] for b in same]) for path in same[0].heads}
        stream = torch.cat([b.stream for b in same])
        blocks.append(
            BlockRelevance(same[0].name, stream, heads, cat([b.attention for b in same]), cat([b.mlp for b in same]))
        )
    return LayerRelevance(tuple(blocks))
