"""What was stacked and is summed again, weighted by constants, is a sum of its parts: a residual's trunk and branch.

A residual's parts may also have been gated. Gated values of equals (the answers of experts) are pooled.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from captum_transformer_attr.errors import UnsupportedOperationError
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording.leaving import place
from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.tags import Part, Tag, tag_of


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
    return tuple(map(Part.of, tensors))


def make_residual(recorder: Recorder, tensors: Iterable[Tensor]) -> bool:
    """Whether their sum has a trunk or branches: one came from another through weights, or from attentions that another
    did not see."""
    found = [tag for tag in map(tag_of, tensors) if tag is not None]
    attentions = recorder.attention_origins()
    different = len({tag.ancestors & attentions for tag in found}) > 1
    return different or any(b.comes_from(a) and b.weighted > a.weighted for a, b in itertools.permutations(found, 2))


def gates(recorder: Recorder, parts: Iterable[Part], factor: Tensor) -> bool:
    """Whether the parts of a stack may be multiplied by this factor one by one."""
    return not factor.requires_grad or make_residual(recorder, (p.tensor for p in parts))


def refuse_lost(recorder: Recorder, tensor: Tensor, dims: Iterable[int]) -> None:
    """
    Raises:
        UnsupportedOperationError: if trunk and branches lie along one of these axes, but what became of each is not
            known.
    """
    tag = tag_of(tensor)
    if any(lay.is_stacked(tag.layout if tag else None, dim) for dim in dims):
        raise UnsupportedOperationError(
            f"{place(recorder.path)} stacks the trunk and the branches of a residual, computes with the stack and sums "
            "it: which is the trunk can no longer be told. Way out: add the branches to the trunk without stacking "
            "them, or register_rule for the module around it."
        )


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
    return tuple(Part.of(p.tensor, along(factor, axis, k) * p.factor) for k, p in enumerate(tag.parts))


def gated_parts(recorder: Recorder, a: Tensor, b: Tensor, shape: Any) -> dict[str, Any]:
    """Entries of the tag of ``a * b``, both live, one of which is a residual's stack."""
    for x, gate in ((a, b), (b, a)):
        tag = tag_of(x)
        if tag is not None and tag.intact and shape == x.shape and gates(recorder, tag.parts, gate):
            with recorder:
                return {"parts": scaled_parts(tag, x, gate, shape), "parts_dim": tag.parts_dim}
    return {}


def weighted_parts(recorder: Recorder, a: Tensor, b: Tensor) -> Any:
    """``a @ b`` as a sum of parts times weights, where a vector (or rows of weights from the left) weighs what was
    stacked; None if that is not what it is."""
    if a.requires_grad and (b.ndim == 1 or b.shape[-1] == 1) and gates(recorder, parts := parts_along(a, -1), b):
        if b.ndim == 1:
            return summed([value(p) * b[k] for k, p in enumerate(parts)])
        return summed([value(p)[..., None] * b[..., k, None, :] for k, p in enumerate(parts)])
    if b.requires_grad and b.ndim > 1 and gates(recorder, parts := parts_along(b, -2), a):
        if a.ndim == 1:
            return summed([value(p) * a[k] for k, p in enumerate(parts)])
        return summed([value(p).unsqueeze(-2) * a[..., k, None] for k, p in enumerate(parts)])
    return None
