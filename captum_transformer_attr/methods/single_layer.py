"""Methods that read the maps of one layer only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.flow.rollout import Passed, passed
from captum_transformer_attr.flow.stream_finder import find_streams
from captum_transformer_attr.methods.base import check_number
from captum_transformer_attr.methods.layer_sum import refuse_lost
from captum_transformer_attr.methods.records import stream_of
from captum_transformer_attr.methods.token_level import TokenAttribution
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording.node import Node
from captum_transformer_attr.recording.outputs import OutputChoice
from captum_transformer_attr.recording.session import Recording


class SingleLayerAttribution(TokenAttribution):
    """Base of the methods that score tokens by the read-out row of one layer's map.

    Several token streams (text and image, encoder and decoder) have layers of their own: every stream's tokens are
    scored by the calls in which they are the keys, so ``layer=-1`` is the last self-attention of each tower of CLIP
    and, for a detector's image, the last cross-attention.

    Args:
        model: any module built on softmax attention; used as it is and left as found.
        layer: which of a stream's attention calls is read, in execution order; negative counts from the end.
        output: name or function that chooses the explained tensor of a structured output.
    """

    def __init__(self, model: nn.Module | Callable[..., Any], layer: int = -1, output: OutputChoice = None) -> None:
        TokenAttribution.__init__(self, model, 0, False, output)
        check_number("layer", layer)
        self.layer = layer

    def active_sets(self, recording: Recording) -> list[list[Attention]]:
        chosen = []
        for stream, calls in by_key_stream(recording).items():
            if not -len(calls) <= self.layer < len(calls):
                raise InputError(
                    f"layer={self.layer}: the tokens of {stream} are the keys of {len(calls)} attention calls "
                    "on the way to this output"
                )
            chosen.append([calls[self.layer]])
        return chosen

    def roll_out(
        self, recording: Recording, maps: Maps, leaves: list[Tensor], watched: Collection[Node]
    ) -> tuple[Passed, Passed]:
        everything, trunk = super().roll_out(recording, maps, leaves, watched)
        if not any(bool((a - t).any()) for a, t in zip(everything.arrived, trunk.arrived, strict=True)):
            # Nothing but zeros: is that what the map says, or have its tokens no way to the input?
            for active in self.active_sets(recording):
                even = passed(recording, self.flow(recording, everywhere, active, False), leaves, watched)
                lost = [a - t for a, t in zip(even.arrived, trunk.arrived, strict=True)]
                refuse_lost(
                    lost, [torch.ones(1, device="cpu")], f"the tokens of the attention in module '{active[0].path}'"
                )
        return everything, trunk


def everywhere(node: Attention, rows: slice) -> Tensor:
    """The same weight for every key."""
    return torch.ones_like(node.probabilities(rows))


def by_key_stream(recording: Recording) -> dict[str, Sequence[Attention]]:
    """Attention calls by the inputs whose tokens are the keys; calls over learned tokens alone (a detector's queries)
    score no input."""
    found: dict[str, list[Attention]] = {}
    # Once such queries have read the image they come from it, too, but they are none of its tokens.
    learned = {call.attention for call in find_streams(recording).calls if call.key.stream.birth is None}
    for node in recording.attentions:
        stream = key_stream(recording, node)
        if stream and node not in learned:
            found.setdefault(stream, []).append(node)
    return found  # type: ignore[return-value]


def key_stream(recording: Recording, node: Attention) -> str:
    """The explained inputs that the key axis holds tokens of, joined by ``+``; empty for learned tokens."""
    tag = node.key_tag
    labels = lay.labels(tag.layout)[-2] if tag is not None and tag.layout is not None else set()
    names = [name for name in recording.inputs.explained if any(label.rpartition(".")[0] == name for label in labels)]
    if names or tag is None:
        return "+".join(names)
    stream = stream_of(recording, tag)
    return "" if stream == "parameters" else stream
