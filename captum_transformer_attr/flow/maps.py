"""Attention maps of one call with the signals that reached them, rebuilt in blocks of query rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.recording.session import Recording
from captum_transformer_attr.rules.table import Signal, divide, gradient_signal


class Maps:
    """Signals at the outputs of the attention calls, from which A, ∇A and R_A follow.

    ∇A = g Vᵀ, R_A = A ⊙ (S Vᵀ) / 2 with S = R / out.

    Attributes:
        given: which keys hold tokens of an input, ``(..., heads, keys)``, where a method asks for it.
    """

    def __init__(self, recording: Recording, attentions: Sequence[Attention]) -> None:
        self.recording, self.attentions = recording, list(attentions)
        self.gradients: dict[Attention, Tensor] = {}
        self.shares: dict[Attention, Tensor] = {}
        self.given: dict[Attention, Tensor] = {}

    def collect_gradients(self) -> None:
        """One backward pass of the ordinary gradient."""
        self.gradients = self.collect(gradient_signal())

    def collect_relevance(self, table: Signal, wrt: Sequence[Tensor] = ()) -> list[Tensor]:
        """One backward pass of relevance; also down to ``wrt`` if given, whose relevance is returned."""
        arrived = self.collect(table, wrt)
        # S = R / out is all that R_A needs, and it is as small as the output.
        self.shares = {node: divide(r, node.y).div_(2) for node, r in arrived.items()}  # type: ignore[attr-defined]
        return self.rest

    def collect(self, signal: Signal, wrt: Sequence[Tensor] = ()) -> dict[Attention, Tensor]:
        outputs = [self.recording.recorder.captured[node] for node in self.attentions]
        grads = self.recording.send(signal, [*outputs, *wrt])
        self.rest = grads[len(outputs) :]
        return dict(zip(self.attentions, grads, strict=False))

    def gradient(self, node: Attention, rows: slice) -> Tensor:
        """∇A for these query rows, ``(..., rows, keys)``."""
        return self.gradients[node][..., rows, :] @ node.value.mT

    def relevance(self, node: Attention, rows: slice, probability: Tensor | None = None) -> Tensor:
        """R_A for these query rows, taken after the half and before the softmax."""
        p = node.probabilities(rows) if probability is None else probability
        return (self.shares[node][..., rows, :] @ node.value.mT).mul_(p)


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
    return maps.reshape(-1, lead[-1], *maps.shape[-2:]) if lead[0] % batch == 0 else torch.as_tensor(maps)
