"""Softmax, and its logarithm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.node import Grads, LocalNode, node_of
from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.registry import handles
from captum_transformer_attr.recording.tags import tag_of


class Softmax(LocalNode):
    """Softmax over one axis. Of a logarithm of one, ``logits`` are its live input and ``dim`` its axis."""

    label = "softmax"
    logits: Tensor | None = None
    dim: int = -1
    keeps_live = ("logits",)

    def gradient(self, g: Tensor) -> Grads:
        (back,) = super().gradient(g)
        # A row whose every key is masked is NaN; where the model hides it afterwards (Longformer) nothing arrives, and
        # nothing may leave.
        return (back if back is None else torch.where(self.y.isnan() & (g == 0), 0, back),)


def softmax_of(recorder: Recorder, input: Tensor, dim: int, dtype: Any = None) -> Tensor:
    """Record a softmax. What all entries of a row share (a maximum taken off) changes nothing and gets nothing."""
    function = functools.partial(torch.softmax, dim=dim, dtype=dtype)
    return run_softmax(recorder, Softmax(), function, unshifted(input, dim), tags.PROBABILITY)


def run_softmax(
    recorder: Recorder, node: Softmax, function: Callable[[Tensor], Tensor], input: Tensor, role: str
) -> Tensor:
    """Record ``node``, which computes ``function``."""
    node.function = function
    tag = tag_of(input)
    return recorder.run(node, input, layout=tag.layout if tag else None, role=role)


def unshifted(input: Tensor, dim: int) -> Tensor:
    """``x`` where the input is ``x + c`` with a live ``c`` that is constant along ``dim``."""
    apart = shift_of(input, dim)
    return input if apart is None else unshifted(apart[0], dim)


def shift_of(input: Tensor, dim: int) -> tuple[Tensor, Tensor] | None:
    """``x`` and ``c`` of such a sum; None if the input is none."""
    operands = getattr(node_of(input), "broadcast", ())
    for x, c in (operands, operands[::-1]) if operands else ():
        axis = dim % input.ndim - input.ndim
        if x.shape == input.shape and (c.ndim < -axis or c.shape[axis] == 1 != x.shape[axis]):
            return x, c
    return None


def log_softmax_of(recorder: Recorder, input: Tensor, dim: int, dtype: Any = None) -> Tensor:
    """Record the logarithm of a softmax."""
    node = Softmax()
    node.logits, node.dim = input, dim
    return run_softmax(recorder, node, functools.partial(torch.log_softmax, dim=dim, dtype=dtype), input, tags.PLAIN)


def axis_of_log_total(total: Tensor, x: Tensor) -> int | None:
    """The axis over which ``total`` is ``log Σ exp(x)``, however it was computed; None if it is something else."""
    axes = [i for i, (a, b) in enumerate(zip(total.shape, x.shape, strict=False)) if a != b]
    if total.ndim != x.ndim or len(axes) != 1 or total.shape[axes[0]] != 1:
        return None
    logits, found = x.detach(), total.detach()
    if torch.equal(found, logits.amax(axes, keepdim=True)):
        return None  # the largest one, taken off for stability
    return axes[0] if torch.allclose(found, logits.logsumexp(axes, keepdim=True)) else None


def softmax_handler(name: str) -> Any:
    record = softmax_of if name == "softmax" else log_softmax_of

    def handler(
        recorder: Recorder, input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None, **_: Any
    ) -> Any:
        dim = dim if dim is not None else (0 if input.ndim in (0, 1, 3) else 1)
        return record(recorder, input, dim, dtype)

    return handler


handles("softmax", "special_softmax")(softmax_handler("softmax"))
handles("log_softmax", "special_log_softmax")(softmax_handler("log_softmax"))
