"""The two attributions that know nothing of the model: every table needs them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from captum_transformer_attr.comparison import Method
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.metrics import center_map
from captum_transformer_attr.recording.inputs import parse

RANDOM = "Random"
CENTER = "ImageCenter"


def random_method(seed: int = 0) -> Method:
    """Uniform noise per pixel or token.

    It depends on the seed and the example's own content alone: neither on the batch nor on the order of calls.
    """

    def noise(values: Tensor) -> Tensor:
        shape = values.shape[2:] if values.ndim == 4 else values.shape[1:2]
        rows = []
        for example in values.detach().cpu():
            content = example.contiguous().float().numpy().tobytes()
            generator = torch.Generator().manual_seed(zlib.crc32(content, seed))
            rows.append(torch.rand(shape, generator=generator))
        return _spread(torch.stack(rows), values)

    return Method(f"{RANDOM} (seed={seed})" if seed else RANDOM, _on_inputs(noise))


def center_method() -> Method:
    """Minus the distance from the middle of the image; images only."""

    def distance(values: Tensor) -> Tensor:
        if values.ndim != 4:
            raise InputError(f"{CENTER} needs images, got inputs of shape {tuple(values.shape)}")
        return _spread(center_map(values.shape[2:]).float().expand(len(values), -1, -1), values)

    return Method(CENTER, _on_inputs(distance))


def _spread(scores: Tensor, values: Tensor) -> Tensor:
    """(N, H, W) or (N, T) scores in the shape of the inputs, on their device."""
    scores = scores.to(values.device)
    if values.ndim == 4:
        return scores[:, None].expand_as(values)
    return scores.view(*scores.shape, *[1] * (values.ndim - 2)).expand_as(values)


def _on_inputs(rule: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any, Any], Any]:
    def attribute(model: nn.Module, inputs: Any, target: Any) -> Any:
        parsed = parse(inputs)
        return parsed.pack({name: rule(parsed.values[name]) for name in parsed.explained})

    return attribute
