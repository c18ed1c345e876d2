"""Quantised linear layers (bitsandbytes, 8 and 4 bits) are followed as linear layers with the weights they stand
for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("Linear4bit", "Linear8bitLt")
# Rounding activations to 8 bits moves the plain output by about this share of its size.
AGREEMENT = 0.1


def quantised_layers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The linear layers of bitsandbytes (and subclasses of them)."""
    modules = list(modules)
    kinds = {kind for kind in set(map(type, modules)) if is_quantised(kind)}
    return [m for m in modules if type(m) in kinds]


def is_quantised(kind: type) -> bool:
    return any(cls.__name__ in KINDS and cls.__module__.startswith("bitsandbytes") for cls in kind.__mro__)


@contextlib.contextmanager
def dequantised(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the context the layers compute ``x Wᵀ + b`` in their input's dtype; their forwards are put back whatever
    happens.

    The weights in full precision live as long as the recording.
    """
    layers = quantised_layers(modules)
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = forward_of(layer)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward


def forward_of(layer: Any) -> Any:
    own = layer.forward

    def forward(x: Tensor) -> Tensor:
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, weight_of(layer, own, x), bias)

    return forward


def weight_of(layer: Any, forward: Any, like: Tensor) -> Tensor:
    """The weight ``(outputs, inputs)`` that a layer's integers stand for: what the layer answers to the unit
    vectors."""
    with torch.no_grad():
        unit = torch.eye(layer.in_features, dtype=like.dtype, device=like.device)
        answer: Tensor = forward(unit)
        if layer.bias is not None:
            answer = answer - layer.bias.to(answer.dtype)
    return answer.to(like.dtype).mT.contiguous()
