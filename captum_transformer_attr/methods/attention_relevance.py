"""AttentionRelevance: Chefer, Gur and Wolf, Generic Attention-model Explainability, ICCV 2021."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from captum_transformer_attr.flow.bimodal import Relations, Rules
from captum_transformer_attr.flow.crossing import StoppedFlow, below, columns_read
from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.flow.rollout import Passed, terminal_sums
from captum_transformer_attr.flow.stream_finder import find_streams
from captum_transformer_attr.flow.streams import StartLayer, Streams
from captum_transformer_attr.flow.token_flow import Flow
from captum_transformer_attr.methods.base import Result, check_number, parsed
from captum_transformer_attr.methods.schedule import Schedule, schedule_of
from captum_transformer_attr.methods.token_level import TokenAttribution
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.recording.inputs import Inputs
from captum_transformer_attr.recording.node import Node
from captum_transformer_attr.recording.outputs import OutputChoice
from captum_transformer_attr.recording.session import Recording


class ConstantAttentionMet(Exception):
    """The relations among learned queries count too: record again. Never leaves the package."""


class AttentionRelevance(TokenAttribution):
    """Gradient × attention for self-, co- and encoder-decoder attention (ICCV 2021).

    Ā = E_h[(∇A ⊙ A)⁺] (eq. 5) for every attention call. A model with self-attention only is one product of (I + Ā)
    (eq. 6), of which the read-out rows are followed. Where tokens of one stream ask those of another, relation matrices
    between the streams are accumulated (eq. 6-11) with the normalisation of eq. 8-9 (0/0 := 0). Which stream asks
    which, and when, is read off the recorded graph.

    Args:
        model: any module built on softmax attention; used as it is and left as found.
        start_layer: attention calls before this one count as identity; 0-based over the calls of every stream, negative
            counts from the end. A mapping gives each stream its own, by the name of an input: ``{"pixel_values": -1}``;
            streams it does not name start at 0.
        normalize: normalise the relations in rule 10 (eq. 8-9). Changes nothing for models without cross-attention.
        self_terms: rule 10 as (R̄^{ss})ᵀ Ā R̄^{qq}; False takes Ā alone, as the paper's ablation.
        use_relevance: (∇A ⊙ R_A)⁺ with the LRP relevance of the attention instead of the attention itself, as the
            paper's ablation.
        output: name or function that chooses the explained tensor of a structured output.

    Example:
        >>> scores = AttentionRelevance(lxmert).attribute_tokens(batch, target=answer)
        >>> scores["input_ids"].shape, scores["visual_feats"].shape  # (N, T), (N, K)
    """

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        start_layer: StartLayer = 0,
        normalize: bool = True,
        *,
        self_terms: bool = True,
        use_relevance: bool = False,
        output: OutputChoice = None,
    ) -> None:
        TokenAttribution.__init__(self, model, 0, False, output)
        by_stream = start_layer if isinstance(start_layer, dict) else {"": start_layer}
        for name, value in by_stream.items():
            check_number(f"start_layer[{name!r}]" if name else "start_layer", value)
        self.first_calls, self.rules = start_layer, Rules(normalize, self_terms)
        self.needs_relevance = use_relevance

    def once(self, inputs: Inputs, target: Any, compute: Callable[[Recording], Result]) -> Result:
        try:
            return super().once(inputs, target, compute)
        except ConstantAttentionMet:
            self._constants = True
            return super().once(inputs, target, compute)

    def schedule(self, inputs: Any, target: Any = None, additional_forward_args: Any = None) -> Schedule:
        """The attention calls on the way to the target with the rules that act at each, in execution order; printable.

        Arguments as in ``attribute``.
        """

        def read(recording: Recording) -> Schedule:
            streams = self.streams(recording)
            active = streams.active(self.first_calls)
            relations = Relations(
                streams.crossing, active, lambda node, rows: node.value, recording.inputs.batch, self.rules
            )
            return schedule_of(streams, active, relations)

        return self.explain(parsed(inputs, additional_forward_args), target, read, lambda results: results[0])

    def streams(self, recording: Recording) -> Streams:
        """The streams of a recording; asks for another one if relations among learned queries are missing in it."""
        streams = find_streams(recording)
        if streams.crossing and recording.recorder.constant_attentions and not recording.recorder.constants:
            raise ConstantAttentionMet
        return streams

    def weights(self, maps: Maps, node: Attention, rows: slice) -> Tensor:
        gradient = maps.gradient(node, rows)
        carried = maps.relevance(node, rows) if self.needs_relevance else node.probabilities(rows)
        return (gradient * carried).clamp_(min=0)

    def active_sets(self, recording: Recording) -> list[list[Attention]]:
        return [self.streams(recording).active(self.first_calls)]

    def roll_out(
        self, recording: Recording, maps: Maps, leaves: list[Tensor], watched: Collection[Node]
    ) -> tuple[Passed, Passed]:
        streams = self.streams(recording)
        if not streams.crossing:
            return super().roll_out(recording, maps, leaves, watched)
        return self.roll_across(streams, recording, maps, leaves, watched)

    def roll_across(
        self, streams: Streams, recording: Recording, maps: Maps, leaves: list[Tensor], watched: Collection[Node]
    ) -> tuple[Passed, Passed]:
        """The row-vector flow from the output to the calls that need matrices, their relations, and on from where the
        streams were born."""
        weights = functools.partial(self.weights, maps)
        crossing = streams.crossing
        active = streams.active(self.first_calls)
        stops = [call.attention for call in crossing]
        batch = recording.inputs.batch
        relations = Relations(crossing, active, weights, batch, self.rules, columns_read(recording, crossing))

        alone = Flow(weights, (), terminal_sums(recording), trunk_only=True)
        alone.watched = watched
        trunk = Passed(recording.send(alone, leaves), alone.seen, alone.reached)
        flow = StoppedFlow(weights, active, terminal_sums(recording), stops, batch)
        flow.watched = watched
        passed = Passed(recording.send(flow, leaves), flow.seen, flow.reached)
        while flow.asked:
            births, starts = below(recording, crossing, relations.rows(flow.asked))
            flow = StoppedFlow(weights, active, (), stops, batch)
            if births:
                flow.watched = watched
                arrived = recording.relay(flow, births, starts, leaves)
                full = [torch.zeros_like(t) if g is None else g for g, t in zip(arrived, leaves, strict=True)]
                passed = passed.plus(Passed(full, flow.seen, flow.reached))
        return passed, trunk
