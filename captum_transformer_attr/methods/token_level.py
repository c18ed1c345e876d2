"""Methods that score tokens by rolling attention maps out through the network."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_transformer_attr.errors import UnsupportedModelError
from captum_transformer_attr.flow.geometry import candidates, token_scores
from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.flow.rollout import Passed, active_attentions, passed, roll_out, terminal_sums
from captum_transformer_attr.flow.token_flow import Flow, Weights
from captum_transformer_attr.methods.base import TransformerAttribution, check_number, parsed
from captum_transformer_attr.methods.propagation import unaccounted
from captum_transformer_attr.methods.records import AttentionRecords, collect_records, join_records
from captum_transformer_attr.methods.scored import Scored
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.ops.softmax import Softmax
from captum_transformer_attr.ops.written_softmax import Exponential
from captum_transformer_attr.recording.node import Node
from captum_transformer_attr.recording.outputs import OutputChoice
from captum_transformer_attr.recording.session import Recording
from captum_transformer_attr.rules.deep_taylor import deep_taylor


class TokenAttribution(TransformerAttribution):
    """Base of the token-level methods: choose the attention weights, the flow does the rest.

    Args:
        model: see ``TransformerAttribution``.
        start_layer: attention calls before this one (0-based, in execution order; negative counts from the end) count
            as identity.
        normalize: divide the rows of (Ā + I) by their sums.
        output: see ``TransformerAttribution``.
    """

    needs_gradient = True
    needs_relevance = False

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        start_layer: int = 0,
        normalize: bool = False,
        output: OutputChoice = None,
    ) -> None:
        TransformerAttribution.__init__(self, model, output)
        check_number("start_layer", start_layer)
        self.start_layer, self.normalize = start_layer, normalize

    def weights(self, maps: Maps, node: Attention, rows: slice) -> Tensor:
        """Ā per head for these query rows, ``(..., rows, keys)``; the flow averages over heads."""
        raise NotImplementedError

    def attention_records(
        self, inputs: Any, target: Any = None, additional_forward_args: Any = None
    ) -> AttentionRecords:
        """What was recorded on the way: one record per attention call, and the relevance of every block's output.

        Costs the N × N maps it returns. Arguments as in ``attribute``.
        """

        def compute(recording: Recording) -> AttentionRecords:
            refuse_without_attention(recording)
            return collect_records(recording, self.needs_relevance)

        return self.explain(parsed(inputs, additional_forward_args), target, compute, join_records)

    def score(self, recording: Recording, delta: bool) -> Scored:
        """Gradient, relevance and flow through one recording."""
        refuse_without_attention(recording)
        maps = Maps(recording, recording.attentions)
        if self.needs_gradient:
            maps.collect_gradients()
        lost = self.relevance_pass(recording, maps, delta)
        names = list(recording.inputs.leaves)
        leaves = [recording.inputs.leaves[n] for n in names]
        watched = {node for n in names for node in candidates(recording, n)}

        everything, trunk = self.roll_out(recording, maps, leaves, watched)
        tokens = {name: token_scores(recording, name, everything, trunk) for name in names}
        return Scored(tokens, lost)

    def roll_out(
        self, recording: Recording, maps: Maps, leaves: list[Tensor], watched: Collection[Node]
    ) -> tuple[Passed, Passed]:
        """What the attention weights bring to the inputs, and the share of it that is the read-out rows' identity."""
        weights = partial(self.weights, maps)

        def passed_by(active: list[Attention], trunk_only: bool) -> Passed:
            return passed(recording, self.flow(recording, weights, active, trunk_only), leaves, watched)

        return roll_out(self.active_sets(recording), passed_by, self.normalize)

    def flow(self, recording: Recording, weights: Weights, active: list[Attention], trunk_only: bool) -> Flow:
        """The token flow with these attention weights."""
        return Flow(weights, active, terminal_sums(recording), trunk_only, self.normalize)

    def active_sets(self, recording: Recording) -> list[list[Attention]]:
        """Sets of attention calls whose weights work together.

        Calls outside a set count as identity, the scores of several sets are added.
        """
        return [active_attentions(recording.attentions, self.start_layer)]

    def relevance_pass(self, recording: Recording, maps: Maps, delta: bool) -> Tensor | None:
        """Relevance of the attention maps; with ``delta`` down to the inputs, counting what parameters took."""
        if not (self.needs_relevance or delta):
            return None
        parameters: dict[str, Tensor] = {}
        # What arrives at learned queries is counted like what arrives at any other parameter.
        wrt = [*recording.inputs.leaves.values(), *recording.recorder.constant_leaves] if delta else []
        arrived = maps.collect_relevance(deep_taylor(), wrt, parameters if delta else None)
        sent = torch.ones_like(recording.selected)
        return unaccounted(recording, sent, arrived, parameters) if delta else None


def refuse_without_attention(recording: Recording) -> None:
    """
    Raises:
        UnsupportedModelError: if there is no attention map to read.
    """
    if not recording.attentions:
        raise UnsupportedModelError(
            f"the model has no softmax attention over tokens between inputs and output{softmax_found(recording)}; "
            f"use TransformerLRP or Captum's IntegratedGradients"
        )


def softmax_found(recording: Recording) -> str:
    """What a model without attention over tokens has instead, and where."""
    for kind, what, meaning in (
        (Attention, "softmax", "is over channels"),
        (Softmax, "softmax", "makes no map of queries and keys"),
        (Exponential, "exponential", "is divided by no sum that makes it a softmax"),
    ):
        paths = [node.path for node in recording.recorder.nodes if isinstance(node, kind)]
        if paths:
            return f" (the {what} in module '{paths[0]}' {meaning})"
    return ""
