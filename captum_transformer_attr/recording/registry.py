"""Which function is recorded how: the files of ``captum_transformer_attr.ops`` enter their handlers here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from captum_transformer_attr.recording.layout import Layout

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
