"""AttentionGradCam: Grad-CAM (Selvaraju et al., ICCV 2017) on the heads of one attention layer, the baseline of CVPR
2021."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.flow.padding import real_queries, seen_keys
from captum_transformer_attr.flow.rollout import Passed
from captum_transformer_attr.methods.layer_sum import TrunkFlow
from captum_transformer_attr.methods.scored import Scored
from captum_transformer_attr.methods.single_layer import SingleLayerAttribution
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.recording.node import Node
from captum_transformer_attr.recording.outputs import OutputChoice
from captum_transformer_attr.recording.session import Recording

AVERAGES = ("row", "map")


class AttentionGradCam(SingleLayerAttribution):
    """The read-out row of (E_h[w_h A_h])⁺, where w_h is a mean of ∇A_h.

    The two published variants differ in that mean. ``"row"`` (vision): over the patch columns of the read-out row, that
    is without its own column and those of learned tokens (class and distillation token, registers). ``"map"`` (text):
    over the whole map. Keys that the mask hides take no part in either. The published code stretches the result to
    0..1.

    Args:
        model: any module built on softmax attention; used as it is and left as found.
        layer: which of a stream's attention calls is read; see ``SingleLayerAttribution``.
        average: ``"row"`` or ``"map"``.
        output: name or function that chooses the explained tensor of a structured output.

    Raises:
        InputError: for an unknown ``average``.
    """

    def __init__(
        self, model: nn.Module | Callable[..., Any], layer: int = -1, average: str = "row", output: OutputChoice = None
    ) -> None:
        SingleLayerAttribution.__init__(self, model, layer, output)
        if average not in AVERAGES:
            raise InputError(f"average={average!r}: choose one of {', '.join(AVERAGES)}")
        self.average = average

    def weights(self, maps: Maps, node: Attention, rows: slice) -> Tensor:
        probability = node.probabilities(rows)
        if self.average == "row":
            visible = (probability > 0) & ~own_column(probability, rows, node.map_shape)
            visible &= maps.given[node][..., None, :]
            return probability * mean_where(visible, maps.gradient(node, rows), (-1,))
        return probability * map_mean(maps, node)

    def roll_out(
        self, recording: Recording, maps: Maps, leaves: list[Tensor], watched: Collection[Node]
    ) -> tuple[Passed, Passed]:
        if self.average == "row":
            maps.given = {n: given_keys(recording, n) for active in self.active_sets(recording) for n in active}
        return super().roll_out(recording, maps, leaves, watched)

    def score(self, recording: Recording, delta: bool) -> Scored:
        scored = super().score(recording, delta)
        return Scored(
            {name: replace(t, scores=t.scores.clamp(min=0)) for name, t in scored.tokens.items()}, scored.delta
        )


def given_keys(recording: Recording, node: Attention) -> Tensor:
    """Which keys hold tokens of an input and not learned ones, ``(..., heads, keys)``; all, if the trunk leads nowhere.

    What scores bring to the inputs along the trunk is linear in them: the gradient tells which of them arrive.
    """
    probe = torch.zeros(node.value.shape[:-1], dtype=node.value.dtype, device=node.value.device, requires_grad=True)
    output = recording.recorder.captured[node]
    leaves = list(recording.inputs.leaves.values())
    found = recording.relay(TrunkFlow({node: probe}), [output], [output.zeros()], leaves, create_graph=True)
    arrived = sum(r.sum() for r in found if r is not None)
    given = torch.zeros_like(probe, dtype=torch.bool)
    if isinstance(arrived, Tensor) and arrived.requires_grad:
        given = torch.autograd.grad(arrived, probe)[0] != 0
    return given | ~given.any()


def own_column(probability: Tensor, rows: slice, map_shape: tuple[int, ...]) -> Tensor:
    """True where a query meets itself, in self-attention; False everywhere in a map that is not square."""
    queries, keys = map_shape[-2:]
    columns = torch.arange(keys, device=probability.device)
    own = columns == torch.arange(rows.start, rows.stop, device=probability.device)[:, None]
    return own if queries == keys else torch.zeros_like(own)


def mean_where(present: Tensor, values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Mean over ``dims`` of the values that are present, 0 where none is."""
    return torch.where(present, values, 0).sum(dims, keepdim=True) / present.sum(dims, keepdim=True).clamp(min=1)


def map_mean(maps: Maps, node: Attention) -> Tensor:
    """Mean of ∇A over the whole map of every head, ``(..., 1, 1)``; hidden keys and padded queries are left out."""
    shown = seen_keys(node)
    real = real_queries(node, maps.recording.attentions)
    total = count = torch.zeros((), device=shown.device)
    for rows in node.blocks():
        gradient = maps.gradient(node, rows)
        present = (shown[..., None, :] & real[..., rows, None]).expand(gradient.shape)
        total = total + torch.where(present, gradient, 0).sum((-2, -1), keepdim=True)
        count = count + present.sum((-2, -1), keepdim=True)
    return total / count.clamp(min=1)
