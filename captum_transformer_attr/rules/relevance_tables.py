"""The tables of TransformerLRP by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.ops.linear import LinearMap
from captum_transformer_attr.recording.node import Grads
from captum_transformer_attr.recording.signal import Signal
from captum_transformer_attr.rules import deep_taylor
from captum_transformer_attr.rules.attnlrp import attnlrp
from captum_transformer_attr.rules.cp import cp
from captum_transformer_attr.rules.libra import libra
from captum_transformer_attr.rules.linear_rules import COMPOSITES, Composite, LinearRule, ZBox, ZPlus

GRADIENT_TABLES = {"attnlrp": attnlrp, "cp": cp, "libra": libra}
TABLES = ("deep_taylor", *GRADIENT_TABLES)


class DeepTaylor(Signal):
    """The ``deep_taylor`` table down to the input: z^B for the map that reads pixels, z⁺ or the composite's rule for
    the others."""

    def __init__(self, composite: Composite | None) -> None:
        super().__init__("deep_taylor", "relevance", {**deep_taylor.TABLE, LinearMap: linear_map})
        self.composite = Composite(pixels=ZBox()) if composite is None else composite


def linear_map(node: LinearMap, r: Tensor, signal: DeepTaylor) -> Grads:
    """The composite's rule; z⁺ where it has none."""
    rule = signal.composite.rule_for(node)
    if rule is None or isinstance(rule, ZPlus):
        return deep_taylor.z_plus(node, r, signal)
    if isinstance(rule, ZBox):
        return (rule.relevance(node, r),)
    return (rule.coefficients(node, r).mul_(node.x),)


def composite_of(choice: str | Composite | None, rules: str) -> Composite | None:
    """A composite by name.

    Raises:
        InputError: for an unknown name, or ``ZBox`` with a table that carries gradients.
    """
    if isinstance(choice, str):
        if choice not in COMPOSITES:
            raise InputError(f"composite={choice!r}: choose one of {', '.join(COMPOSITES)}, or give a Composite")
        choice = COMPOSITES[choice]
    if choice is not None and not isinstance(choice, Composite):
        raise InputError(f"composite: expected a name or a Composite, got {type(choice).__name__}")
    for rule in () if choice is None else choice.rules():
        if not isinstance(rule, LinearRule):
            raise InputError(f"composite: expected rules such as Epsilon(), got {rule!r}")
    if choice is not None and rules in GRADIENT_TABLES and any(isinstance(rule, ZBox) for rule in choice.rules()):
        raise InputError(
            f"composite: ZBox needs rules='deep_taylor'; rules='{rules}' carries a modified gradient, "
            "which z^B has none of"
        )
    return choice


def table(rules: str, composite: Composite | None = None) -> Signal:
    """A new signal by the name of its table.

    Raises:
        InputError: for an unknown name.
    """
    if rules not in TABLES:
        raise InputError(f"rules={rules!r}: choose one of {', '.join(TABLES)}")
    factory: Any = GRADIENT_TABLES.get(rules, DeepTaylor)
    return factory(composite)  # type: ignore[no-any-return]
