"""What a signal is: a table from kinds of operations to rules, sent back through the recorded graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_transformer_attr.errors import UnsupportedOperationError
from captum_transformer_attr.recording.leaving import place, way_out
from captum_transformer_attr.recording.node import Grads, Node

Rule = Callable[[Any, Tensor, Any], Grads]


class Signal:
    """What travels back. ``rules`` maps node classes to ``rule(node, arriving, signal)``; the most specific class wins.

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
                f"no '{self.name}' rule for operation '{node.label}' in {place(node.path)}. "
                f"Way out: {way_out(node.path)}."
            )
        return rule(node, arriving, self)


def ordinary(node: Node, g: Tensor, signal: Signal) -> Grads:
    """The ordinary gradient."""
    return node.gradient(g)


def gradient_signal() -> Signal:
    """The ordinary gradient of the selected output."""
    return Signal("gradient", "gradient", {Node: ordinary})


@dataclass(frozen=True)
class Pass:
    """One backward pass: the signal that travels, and where relevance that arrives at parameters is added up, per
    module path ``(N,)``; None where nobody asks."""

    signal: Signal
    absorbed: dict[str, Tensor] | None = None
