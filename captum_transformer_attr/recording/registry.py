"""Which function and which module is recorded how: the files of ``captum_transformer_attr.ops`` enter it here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from captum_transformer_attr.recording.layout import Layout

if TYPE_CHECKING:
    from captum_transformer_attr.recording.node import Node

Handler = Callable[..., Any]
Inference = Callable[..., "Layout | None"]

HANDLERS: dict[str, Handler] = {}  # function name → what makes a node of it
# Function name → what happens if no operand depends on an input: ``handler(recorder, function, *args)``.
ON_CONSTANTS: dict[str, Handler] = {}
LAYOUTS: dict[str, Inference] = {}  # view-like function name → layout of its result
REFUSED = {
    "grid_sample": "deformable attention reads values at positions of its own and has no attention map",
    **dict.fromkeys(
        ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell"),
        "a recurrence over tokens has no attention map and no rule",
    ),
}  # function name → why


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register what makes a node of the torch functions with these names: ``handler(recorder, *args, **kwargs)``.

    A handler returns ``NotImplemented`` to leave this call to torch itself (the audit then judges it).
    """

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def infers(*names: str) -> Callable[[Inference], Inference]:
    """Register how functions with these names change the layout: ``infer(result, *args, **kwargs)``."""

    def register(infer: Inference) -> Inference:
        LAYOUTS.update(dict.fromkeys(names, infer))
        return infer

    return register


class ModuleRule(Protocol):
    """What a user registered for a module class."""

    def operation(self, module: nn.Module, leaves: list[Tensor], y: Tensor) -> Node:
        """The one operation that a module is, from ``leaves`` to ``y``."""


MODULE_RULES: dict[type[nn.Module], ModuleRule] = {}


def rule_for_module(module: nn.Module) -> ModuleRule | None:
    """The rule registered for a module's class or the nearest of its bases."""
    kinds = type(module).__mro__ if MODULE_RULES else ()
    return next((MODULE_RULES[kind] for kind in kinds if kind in MODULE_RULES), None)
