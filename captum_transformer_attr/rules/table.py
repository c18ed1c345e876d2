"""What a signal is: a table from kinds of operations to rules, sent back through the recorded graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.errors import UnsupportedOperationError
from captum_transformer_attr.recording.node import Grads, Node

Rule = Callable[[Any, Tensor, Any], Grads]


class Signal:
    """One backward pass. ``rules`` maps node classes to ``rule(node, arriving, signal)``; the most specific class wins.

    ``carries`` tells what travels: ``"gradient"`` (also the modified gradients g of rules with R = x ⊙ g),
    ``"relevance"``, or ``"flow"`` (any tensor whose channel sum is a token's relevance).
    """

    def __init__(self, name: str, carries: str, rules: Mapping[type[Node], Rule]) -> None:
        self.name, self.carries, self.rules = name, carries, rules

    def rule_for(self, kind: type[Node]) -> Rule | None:
        """The rule of a kind of operation, None if the table has none."""
        return next((self.rules[cls] for cls in kind.__mro__ if cls in self.rules), None)

    def send(self, node: Node, arriving: Tensor) -> Grads:
        """Pass the signal through one node."""
        rule = self.rule_for(type(node))
        if rule is None:
            raise UnsupportedOperationError(
                f"no '{self.name}' rule for operation '{node.label}' in module '{node.path}'. "
                f"Way out: register_rule(type(model.get_submodule('{node.path}')), relevance=...)."
            )
        return rule(node, arriving, self)


def ordinary(node: Node, g: Tensor, signal: Signal) -> Grads:
    """The ordinary gradient."""
    return node.gradient(g)


def gradient_signal() -> Signal:
    """The ordinary gradient of the selected output."""
    return Signal("gradient", "gradient", {Node: ordinary})


STABILISER = 1e-9  # the published one, added whatever the sign of the denominator
# float64 divides by smaller numbers than this as they are: beside them the stabiliser would take relevance away.
RESOLVED = 1e-6
NOTHING = {
    torch.float64: 1e-150,
    torch.float32: 1e-36,
}  # what is smaller is treated as 0: a quotient by it would overflow


def stabilised(b: Tensor) -> Tensor:
    """``b`` plus the published stabiliser, in float64 only where ``b`` is large beside it."""
    if b.dtype != torch.float64:
        return b + STABILISER
    return torch.where(b.abs() < RESOLVED, b, b + STABILISER)


def is_nothing(b: Tensor) -> Tensor:
    """Where ``b`` is 0, or so near to it (an attention that underflows) that a quotient would overflow."""
    return b.abs() < NOTHING[b.dtype] if b.dtype in NOTHING else b == 0


def divide(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, stabilised, 0 where b is nothing."""
    return torch.where(is_nothing(b), 0, a / stabilised(b))
