"""The tensor of scores inside whatever a model returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from captum_transformer_attr.errors import InputError

SCORES = ("logits", "logits_per_image", "question_answering_score", "prediction_logits")


def scores_of(output: Any) -> Tensor:
    """Logits of a ``ModelOutput``, a mapping, a tuple or a tensor.

    Raises:
        InputError: if there is no floating tensor in it.
    """
    if isinstance(output, Tensor):
        return output
    values: list[Any] = []
    if isinstance(output, Mapping):
        values = [*(output.get(key) for key in SCORES), *output.values()]
    elif isinstance(output, tuple | list):
        values = list(output)
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise InputError(f"the model returns a {type(output).__name__} without a floating tensor")
