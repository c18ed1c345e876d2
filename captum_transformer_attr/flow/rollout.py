"""Attention weights rolled out: passes of the token flow, and the read-out rows' identity apart."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.flow.token_flow import Flow
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.ops.residual import Sum
from captum_transformer_attr.recording.node import Node
from captum_transformer_attr.recording.session import Recording


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


def passed(recording: Recording, signal: Flow, leaves: list[Tensor], watched: Collection[Node]) -> Passed:
    """One pass of the token flow down to ``leaves``."""
    signal.watched = watched
    arrived = recording.send(signal, leaves)
    through = [a - signal.corrections.pop(i, 0) for i, a in enumerate(arrived)]
    return Passed(through, signal.seen, signal.reached)


def roll_out(
    active_sets: list[list[Attention]], passed_by: Callable[[list[Attention], bool], Passed], normalize: bool
) -> tuple[Passed, Passed]:
    """What the attention weights bring to the inputs, and the share of it that is the read-out rows' identity.

    Args:
        active_sets: attention calls whose weights work together; the scores of several sets are added.
        passed_by: the pass in which these calls are active, or of the trunk only.
        normalize: whether rows are divided by their sums.
    """

    def identity(active: list[Attention]) -> Passed:
        # Where rows are divided by their sums, so is the identity in them: the whole of it would be more than is there.
        return passed_by(active if normalize else [], True)

    first, *others = active_sets
    everything, trunk = passed_by(first, False), identity(first)
    for active in others:
        everything = everything.plus(passed_by(active, False)).plus(identity(active), -1)
    return everything, trunk


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


def terminal_sums(recording: Recording) -> list[Sum]:
    """Residual sums with an attention branch after which no attention follows on the way to the output."""
    return [
        node
        for node in recording.nodes
        if isinstance(node, Sum)
        and any(node.attends)
        and not any(a.tag.ancestors >> node.tag.origin & 1 for a in recording.attentions)
    ]
