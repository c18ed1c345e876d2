"""Which tensor of a model's output the target selects from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from captum_transformer_attr.errors import InputError

PREFERRED = ("logits", "logits_per_image", "question_answering_score", "prediction_logits")

OutputChoice = str | Callable[[Any], Tensor] | None


def unwrap(output: Any, choice: OutputChoice = None) -> Tensor:
    """The tensor that targets are selected from.

    Args:
        output: whatever the model returned: a Tensor, a ``ModelOutput``, another mapping, a tuple.
        choice: name of an entry, or a callable that picks the tensor; None takes ``logits``, ``logits_per_image``,
            ``question_answering_score``, ``prediction_logits``, else the first floating tensor.

    Raises:
        InputError: if there is no such tensor.
    """
    if callable(choice):
        chosen = choice(output)
        if not isinstance(chosen, Tensor):
            raise InputError(f"output: the function chose {type(chosen).__name__}, not a Tensor")
        return chosen
    if isinstance(output, Tensor):
        return output
    if choice is not None:
        found = output.get(choice) if isinstance(output, Mapping) else getattr(output, choice, None)
        if not isinstance(found, Tensor):
            keys = ", ".join(output) if isinstance(output, Mapping) else type(output).__name__
            raise InputError(f"output='{choice}': the model returned no such tensor ({keys})")
        return found
    entries = output if isinstance(output, Mapping) else {k: getattr(output, k, None) for k in PREFERRED}
    for key in PREFERRED:
        found = entries.get(key)
        if isinstance(found, Tensor):
            return found
    for value in flattened(output):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise InputError(f"the model returned {type(output).__name__} without a floating tensor; choose one with output=")


def flattened(value: Any) -> Iterable[Any]:
    """Leaves of nested mappings, data classes, tuples and lists."""
    if isinstance(value, Mapping):
        value = value.values()
    elif dataclasses.is_dataclass(value):
        value = tuple(vars(value).values())
    elif not isinstance(value, (tuple, list)):
        yield value
        return
    for item in value:
        yield from flattened(item)


class ForwardWrapper(nn.Module):
    """Makes a model return the tensor that targets are selected from, for Captum's own methods and metrics.

    Captum's ``infidelity`` and ``sensitivity_max`` need a forward that returns a Tensor. With ``keys``, positional
    tensors are passed to the model as keyword arguments of these names.

    Args:
        model: any module.
        output: as in the attribution classes.
        keys: names of the positional arguments, None to pass them positionally.
    """

    def __init__(self, model: nn.Module, output: OutputChoice = None, keys: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.model, self.output, self.keys = model, output, keys

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.keys is not None:
            kwargs = {**dict(zip(self.keys, args, strict=False)), **kwargs}
            args = args[len(self.keys) :]
        return unwrap(self.model(*args, **kwargs), self.output)
