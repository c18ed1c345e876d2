"""Attention maps of one call with the signals that reached them, rebuilt in blocks of query rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_transformer_attr.ops.attention import Attention, ValueProduct
from captum_transformer_attr.ops.division import divide
from captum_transformer_attr.recording.session import Recording
from captum_transformer_attr.recording.signal import Signal, gradient_signal
from captum_transformer_attr.recording.snapshot import Place


class Maps:
    """Signals at the outputs of the attention calls, from which A, ∇A and R_A follow.

    ∇A = g Vᵀ, R_A = A ⊙ (S Vᵀ) / 2 with S = R / out.

    Attributes:
        given: which keys hold tokens of an input, ``(..., heads, keys)``, where a method asks for it.
    """

    def __init__(self, recording: Recording, attentions: Sequence[Attention]) -> None:
        self.recording, self.attentions = recording, list(attentions)
        self.elsewhere = read_elsewhere(recording, self.attentions)
        self.at_maps: dict[str, dict[Attention, Tensor]] = {}
        self.gradients: dict[Attention, Tensor] = {}
        self.shares: dict[Attention, Tensor] = {}
        self.given: dict[Attention, Tensor] = {}

    def collect_gradients(self) -> None:
        """One backward pass of the ordinary gradient."""
        self.gradients = self.collect(gradient_signal())

    def collect_relevance(
        self, table: Signal, wrt: Sequence[Place] = (), absorbed: dict[str, Tensor] | None = None
    ) -> list[Tensor]:
        """One backward pass of relevance; also down to ``wrt`` if given, whose relevance is returned.

        ``absorbed``: see ``Recording.send``.
        """
        arrived = self.collect(table, wrt, absorbed)
        # S = R / out is all that R_A needs, and it is as small as the output.
        self.shares = {node: divide(r, node.y).div_(2) for node, r in arrived.items()}  # type: ignore[attr-defined]
        return self.rest

    def collect(
        self, signal: Signal, wrt: Sequence[Place] = (), absorbed: dict[str, Tensor] | None = None
    ) -> dict[Attention, Tensor]:
        outputs = [self.recording.recorder.captured[node] for node in self.attentions]
        edges = list(self.elsewhere.values())
        grads = self.recording.send(signal, [*outputs, *edges, *wrt], absorbed=absorbed)
        self.at_maps[signal.carries] = dict(zip(self.elsewhere, grads[len(outputs) :], strict=False))
        self.rest = grads[len(outputs) + len(edges) :]
        return dict(zip(self.attentions, grads, strict=False))

    def gradient(self, node: Attention, rows: slice) -> Tensor:
        """∇A for these query rows, ``(..., rows, keys)``."""
        if node in self.elsewhere:
            return self.at_maps["gradient"][node][..., rows, :].clone()
        return shared(node, self.gradients[node][..., rows, :] @ node.value.mT)

    def relevance(self, node: Attention, rows: slice, probability: Tensor | None = None) -> Tensor:
        """R_A for these query rows, taken after the half and before the softmax."""
        if node in self.elsewhere:
            return self.at_maps["relevance"][node][..., rows, :].clone()
        p = node.probabilities(rows) if probability is None else probability
        return shared(node, (self.shares[node][..., rows, :] @ node.value.mT).mul_(p))


def read_elsewhere(recording: Recording, attentions: Sequence[Attention]) -> dict[Attention, GradientEdge]:
    """The maps that are read elsewhere too, say as weights of relative positions (Shaw et al. 2018).

    What reaches them on every way counts. Of a map that several attention calls read each has a record of its own.
    """
    readers: Counter[tuple[Any, int]] = Counter()
    stack, seen = [recording.selected.grad_fn], set()
    while stack:
        fn = stack.pop()
        if fn is not None and fn not in seen:
            seen.add(fn)
            readers.update(fn.next_functions)
            stack += [f for f, _ in fn.next_functions]
    maps: dict[Attention, Any] = {}
    for node in attentions:
        if isinstance(node, ValueProduct):
            maps[node] = recording.recorder.captured[node].edge.node.next_functions[-2]
    calls = Counter(maps.values())
    return {node: GradientEdge(*edge) for node, edge in maps.items() if readers[edge] > 1 == calls[edge]}


def shared(node: Attention, part: Tensor) -> Tensor:
    """What reached a map that several heads share is the sum of what reached it through each."""
    lead = node.probability.shape[:-2] if isinstance(node, ValueProduct) else part.shape[:-2]
    if lead == part.shape[:-2]:
        return part
    return part.sum_to_size(*lead, *part.shape[-2:]).expand_as(part).contiguous()


def whole(node: Attention) -> slice:
    """All query rows."""
    return slice(0, node.map_shape[-2])


def by_example(node: Attention, maps: Tensor, batch: int) -> Tensor:
    """Maps ``(..., queries, keys)`` as ``(B, H, queries, keys)``.

    Windows of a hierarchical model count as examples ``(B · windows, H, …)``.
    """
    lead = maps.shape[:-2]
    if len(lead) == 2:
        return maps
    if len(lead) < 2:
        return maps.reshape(batch, -1, *maps.shape[-2:])
    return maps.reshape(-1, lead[-1], *maps.shape[-2:]) if lead[0] % batch == 0 else maps
