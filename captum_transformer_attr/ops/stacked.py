"""What was stacked and is summed again, weighted by constants, is a sum of its parts: a residual's trunk and branch."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from captum_transformer_attr.recording.tags import Part, Tag, tag_of, version


def parts_along(tensor: Any, dim: int) -> tuple[Part, ...]:
    """The parts that were joined along an axis; none if it was not made that way."""
    tag = tag_of(tensor)
    return tag.parts if tag is not None and tag.intact and tag.parts_dim == dim % tensor.ndim else ()


def summed(terms: Iterable[Any]) -> Any:
    """Their sum; None if there are none."""
    terms = list(terms)
    return functools.reduce(operator.add, terms) if terms else None


def value(part: Part) -> Any:
    """The part as it stands in the stack."""
    return part.tensor * part.factor


def as_parts(tensors: Iterable[Tensor]) -> tuple[Part, ...]:
    """Parts that are stacked as they are."""
    return tuple(Part(t, 1.0, version(t)) for t in tensors)


def along(factor: Any, axis: int, k: int) -> Any:
    """Entry k of a factor along ``axis``, counted from the end, to which it is broadcast."""
    if not isinstance(factor, Tensor) or factor.ndim < -axis:
        return factor
    return factor.select(axis, k if factor.shape[axis] > 1 else 0)


def scaled_parts(tag: Tag, x: Tensor, factor: Any, shape: Any) -> tuple[Part, ...]:
    """The parts of ``x * factor``, which has this shape."""
    if not tag.intact or shape != x.shape:
        return ()
    axis = tag.parts_dim - x.ndim
    return tuple(p._replace(factor=along(factor, axis, k) * p.factor) for k, p in enumerate(tag.parts))


def weighted_parts(a: Tensor, b: Tensor) -> Any:
    """``a @ b`` as a sum of parts times constants, where a constant vector (or rows of weights from the left) weighs
    what was stacked; None if that is not what it is."""
    if a.requires_grad and (b.ndim == 1 or b.shape[-1] == 1):
        parts = parts_along(a, -1)
        if b.ndim == 1:
            return summed([value(p) * b[k] for k, p in enumerate(parts)])
        return summed([value(p)[..., None] * b[..., k, None, :] for k, p in enumerate(parts)])
    if b.requires_grad and b.ndim > 1:
        parts = parts_along(b, -2)
        if a.ndim == 1:
            return summed([value(p) * a[k] for k, p in enumerate(parts)])
        return summed([value(p).unsqueeze(-2) * a[..., k, None] for k, p in enumerate(parts)])
    return None
