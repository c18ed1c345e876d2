"""Methods that score tokens by rolling attention maps out through the network."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from captum.log import log_usage
from torch import Tensor, nn

from captum_transformer_attr.errors import InputError, UnsupportedModelError
from captum_transformer_attr.flow.geometry import TokenScores, candidates, token_scores
from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.flow.token_flow import Flow, Weights
from captum_transformer_attr.methods.base import (
    TransformerAttribution,
    check_interpolation,
    check_number,
    finished,
    parsed,
)
from captum_transformer_attr.methods.records import AttentionRecords, collect_records, join_records
from captum_transformer_attr.ops.attention import Attention, Softmax
from captum_transformer_attr.ops.residual import Sum
from captum_transformer_attr.recording.inputs import Inputs
from captum_transformer_attr.recording.node import Node
from captum_transformer_attr.recording.outputs import OutputChoice
from captum_transformer_attr.recording.session import Recording
from captum_transformer_attr.rules.deep_taylor import deep_taylor


@dataclass(frozen=True)
class Scored:
    """Token scores of every explained input, and the convergence delta if it was asked for."""

    tokens: dict[str, TokenScores]
    delta: Tensor | None = None


@dataclass(frozen=True)
class Passed:
    """What one flow brought to the inputs and to the operations that were watched.

    ``reached``: the operations it passed.
    """

    arrived: list[Tensor]
    seen: dict[Node, Tensor]
    reached: set[Node]

    def plus(self, other: Passed, factor: float = 1) -> Passed:
        """This plus ``factor`` times the other."""
        seen = dict(self.seen)
        for node, r in other.seen.items():
            seen[node] = seen[node] + factor * r if node in seen else factor * r
        arrived = [a + factor * b for a, b in zip(self.arrived, other.arrived, strict=True)]
        return Passed(arrived, seen, self.reached | other.reached)


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

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        return_convergence_delta: bool = False,
        interpolate: str = "bilinear",
    ) -> Any:
        """Scores in the inputs' shape.

        Args:
            inputs: a Tensor, a tuple of Tensors (positional arguments) or a mapping (keyword arguments); floats and
                token ids alike.
            target: as in Captum: None, int, list, tensor, tuple(s).
            additional_forward_args: further positional arguments of the model.
            return_convergence_delta: also return ``(N,)``: relevance sent back minus relevance that arrived at inputs
                and parameters.
            interpolate: how token scores are spread over pixels, ``"bilinear"`` or ``"nearest"``.

        Returns:
            Tensor, tuple or dict as ``inputs``, each of its input's shape: float, detached, contiguous. Images: every
            pixel has its token's score, equal over channels. Ids ``(N, T)``: one score per id. With
            ``return_convergence_delta`` a pair.

        Raises:
            UnsupportedOperationError: if an operation has no rule.
            InputError: for an argument that cannot be used.
        """
        check_interpolation(interpolate)
        given = parsed(inputs, additional_forward_args)
        scored = self.scored(given, target, return_convergence_delta)
        shapes = {name: given.shape(name) for name in scored.tokens}
        result = given.pack(
            {
                name: finished(t.spread(shapes[name], interpolate), given.values[name])
                for name, t in scored.tokens.items()
            }
        )
        return (result, scored.delta) if return_convergence_delta else result

    def attribute_tokens(self, inputs: Any, target: Any = None, additional_forward_args: Any = None) -> Any:
        """Scores per token, in the scale of the published formula, before they are spread over the input.

        Args:
            inputs, target, additional_forward_args: as in ``attribute``.

        Returns:
            Same container as ``inputs``: images ``(N, h, w)`` (finest stage, no class or register token), ids ``(N,
            T)``, feature sequences ``(N, K)``.
        """
        given = parsed(inputs, additional_forward_args)
        scored = self.scored(given, target, False)
        return given.pack({name: finished(t.scores, given.values[name]) for name, t in scored.tokens.items()})

    def attribute_tokens_each(
        self, inputs: Any, targets: Sequence[Any], additional_forward_args: Any = None
    ) -> list[Any]:
        """Token scores for several targets of the same inputs: several detections of one image, every position of a
        generated text. They share one forward.

        Args:
            inputs, additional_forward_args: as in ``attribute``.
            targets: targets as in ``attribute``, each for the whole batch.

        Returns:
            For every target what ``attribute_tokens`` returns.

        Raises:
            InputError: for no target at all.
        """
        if not targets:
            raise InputError("targets is empty; give at least one")
        given = parsed(inputs, additional_forward_args)
        found = self.explain_each(given, targets, lambda recording: self.score(recording, False), join_scored)
        return [given.pack({n: finished(t.scores, given.values[n]) for n, t in s.tokens.items()}) for s in found]

    def attention_records(
        self, inputs: Any, target: Any = None, additional_forward_args: Any = None
    ) -> AttentionRecords:
        """What was recorded on the way: one record per attention call, and the relevance of every block's output.

        Costs the N × N maps it returns. Arguments as in ``attribute``.
        """
        given = parsed(inputs, additional_forward_args)
        return self.explain(
            given, target, lambda recording: collect_records(recording, self.needs_relevance), join_records
        )

    # ------------------------------------------------------------------ computation
    def scored(self, inputs: Inputs, target: Any, delta: bool) -> Scored:
        return self.explain(inputs, target, lambda recording: self.score(recording, delta), join_scored)

    def score(self, recording: Recording, delta: bool) -> Scored:
        """Gradient, relevance and flow through one recording."""
        if not recording.attentions:
            raise UnsupportedModelError(
                f"the model has no softmax attention over tokens between inputs and output{softmax_found(recording)}; "
                f"use TransformerLRP or Captum's IntegratedGradients"
            )
        maps = Maps(recording, recording.attentions)
        if self.needs_gradient:
            maps.collect_gradients()
        lost = self.relevance_pass(recording, maps, delta)
        names = list(recording.inputs.leaves)
        leaves = [recording.inputs.leaves[n] for n in names]
        watched = {node for n in names for node in candidates(recording, n)}

        passed, trunk = self.roll_out(recording, maps, leaves, watched)
        (arrived, seen), (at_trunk, trunk_seen) = (passed.arrived, passed.seen), (trunk.arrived, trunk.seen)
        tokens = {
            name: token_scores(recording, name, leaves[i], arrived[i], seen, trunk_seen, at_trunk[i], passed.reached)
            for i, name in enumerate(names)
        }
        return Scored(tokens, lost)

    def roll_out(
        self, recording: Recording, maps: Maps, leaves: list[Tensor], watched: Collection[Node]
    ) -> tuple[Passed, Passed]:
        """What the attention weights bring to the inputs, and the share of it that is the read-out rows' identity."""

        def passed_by(active: list[Attention], trunk_only: bool = False) -> Passed:
            weights = partial(self.weights, maps)
            return self.passed(recording, weights, active, leaves, watched, trunk_only)

        def identity(active: list[Attention]) -> Passed:
            # Where rows are divided by their sums, so is the identity in them: the whole of it would be more than is
            # there.
            return passed_by(active if self.normalize else [], trunk_only=True)

        first, *others = self.active_sets(recording)
        passed, trunk = passed_by(first), identity(first)
        for active in others:
            passed = passed.plus(passed_by(active)).plus(identity(active), -1)
        return passed, trunk

    def passed(
        self,
        recording: Recording,
        weights: Weights,
        active: list[Attention],
        leaves: list[Tensor],
        watched: Collection[Node],
        trunk_only: bool = False,
    ) -> Passed:
        """One pass of the token flow."""
        signal = self.flow(recording, weights, active, trunk_only)
        signal.watched = watched
        arrived = recording.send(signal, leaves)
        through = [a - signal.corrections.pop(i, 0) for i, a in enumerate(arrived)]
        return Passed(through, signal.seen, signal.reached)

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
        if not delta:
            return None
        batch = recording.inputs.batch
        total = torch.ones(batch, dtype=torch.float64, device=recording.selected.device)
        for r in arrived:
            total = total - r.double().reshape(batch, -1).sum(1)
        for r in parameters.values():
            total = total - r
        return total.to(recording.selected.dtype)


def join_scored(results: list[Scored]) -> Scored:
    tokens = {
        name: TokenScores(torch.cat([r.tokens[name].scores for r in results]), first.axes, first.stride)
        for name, first in results[0].tokens.items()
    }
    deltas = [r.delta for r in results]
    return Scored(tokens, torch.cat([d for d in deltas if d is not None]) if deltas[0] is not None else None)


def active_attentions(attentions: list[Attention], start_layer: int) -> list[Attention]:
    """The attention calls from ``start_layer`` on.

    Raises:
        InputError: if there are not as many.
    """
    if not -len(attentions) <= start_layer < len(attentions):
        raise InputError(
            f"start_layer={start_layer}: the model has {len(attentions)} attention calls on the way to this output"
        )
    return attentions[start_layer:]


def softmax_found(recording: Recording) -> str:
    """What a model without attention over tokens has instead, and where."""
    for kind, meaning in (
        (Attention, "is over channels"),
        (Softmax, "makes no map of queries and keys"),
    ):
        paths = [node.path for node in recording.recorder.nodes if isinstance(node, kind)]
        if paths:
            return f" (the softmax in module '{paths[0]}' {meaning})"
    return ""


def terminal_sums(recording: Recording) -> list[Sum]:
    """Residual sums with an attention branch after which no attention follows on the way to the output."""
    return [
        node
        for node in recording.nodes
        if isinstance(node, Sum)
        and any(node.attends)
        and not any(a.tag.ancestors >> node.tag.origin & 1 for a in recording.attentions)
    ]
