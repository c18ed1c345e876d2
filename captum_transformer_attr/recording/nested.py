"""Tensors in nested arguments and results: lists, tuples and dicts of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """All tensors in arguments, also inside lists, tuples and dicts."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
        elif isinstance(value, dict):
            found += tensors_in(value.values())
    return found


def replaced(value: Any, by_id: dict[int, Tensor]) -> Any:
    """A nested structure with some tensors replaced."""
    if isinstance(value, Tensor):
        return by_id.get(id(value), value)
    if isinstance(value, tuple):
        items = [replaced(v, by_id) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [replaced(v, by_id) for v in value]
    if isinstance(value, dict):
        return type(value)({k: replaced(v, by_id) for k, v in value.items()})
    return value
