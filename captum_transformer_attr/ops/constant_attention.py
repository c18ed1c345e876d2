"""Attention among learned queries that have read nothing yet.

Such is the first decoder layer of DETR, or of a Q-Former. No input reaches the call, so it is not on the way from
output to input. The relations between the queries that it makes do enter rule 10 of ICCV 2021: asked for
(``Recorder.constants``), its values become a leaf of the graph, and the call is recorded like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.ops.attention import ValueProduct, scaled_dot_product_attention
from captum_transformer_attr.ops.bilinear import attend
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.registry import ON_CONSTANTS
from captum_transformer_attr.recording.tags import Tag

PROBABILITY = "_captum_transformer_attr_probability"  # marks a constant tensor as the result of a softmax


def mark(recorder: Recorder, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Softmax of constants."""
    result = func(*args, **kwargs)
    setattr(result, PROBABILITY, True)
    return result


def move(recorder: Recorder, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Casts, views and dropout leave probabilities probabilities."""
    result = func(*args, **kwargs)
    if isinstance(result, Tensor) and isinstance(args[0], Tensor) and hasattr(args[0], PROBABILITY):
        setattr(result, PROBABILITY, True)
    return result


def fused(recorder: Recorder, func: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``F.scaled_dot_product_attention`` of constants."""
    if not followed(recorder, value):
        return func(query, key, value, *args, **kwargs)
    result = scaled_dot_product_attention(recorder, query, key, leaf(recorder, value), *args, **kwargs)
    return func(query, key, value, *args, **kwargs) if result is NotImplemented else result


def product(recorder: Recorder, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Constant probabilities times constant values."""
    operands = [*args, *kwargs.values()]
    if (
        len(operands) != 2
        or not hasattr(operands[0], PROBABILITY)
        or operands[1].ndim < 3
        or not followed(recorder, operands[1])
    ):
        return func(*args, **kwargs)
    probability, value = operands
    known = layout_of(recorder, value)
    rows = None if known is None else (*known[:-2], lay.axis(lay.MIXED, probability.shape[-2]), known[-1])
    return attend(recorder, ValueProduct(), probability, leaf(recorder, value), rows, 1)


def followed(recorder: Recorder, value: Tensor) -> bool:
    """Count the call, and tell whether it shall and can be recorded: its queries must be repeated for every example."""
    if not torch.is_grad_enabled() or not value.is_floating_point():
        return False
    recorder.constant_attentions += 1
    return recorder.constants and layout_of(recorder, value) is not None


def leaf(recorder: Recorder, value: Tensor) -> Tensor:
    """The values as a leaf of the recorded graph."""
    result = value.detach().clone().requires_grad_()
    recorder.counter += 1
    number = recorder.counter
    setattr(
        result, tags.ATTRIBUTE, Tag(origin=number, ancestors=1 << number, weighted=1, layout=layout_of(recorder, value))
    )
    recorder.constant_leaves.append(result)
    return result


def layout_of(recorder: Recorder, value: Tensor) -> lay.Layout | None:
    """Layout of values ``(B, H, N, d)`` or ``(B · H, N, d)``."""
    batch, first = recorder.batch, value.shape[0]
    if value.ndim not in (3, 4) or first % batch or (value.ndim == 4 and first != batch):
        return None
    heads = first // batch if value.ndim == 3 else value.shape[1]
    lead = (lay.axis(lay.BATCH, batch), lay.axis(lay.FEATURE, heads))
    joined = lead if value.ndim == 4 else (lead[0] + lead[1],)
    return (*joined, lay.axis(lay.MIXED, value.shape[-2]), lay.axis(lay.FEATURE, value.shape[-1]))


ON_CONSTANTS["softmax"] = mark
ON_CONSTANTS["scaled_dot_product_attention"] = fused
ON_CONSTANTS.update(dict.fromkeys(("matmul", "__matmul__", "bmm"), product))
ON_CONSTANTS.update(
    dict.fromkeys(
        ("dropout", "to", "type", "type_as", "float", "half", "bfloat16", "view", "reshape", "contiguous"), move
    )
)
