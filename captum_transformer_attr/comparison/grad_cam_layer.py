"""Where Grad-CAM looks in a transformer, and in which layout.

Captum's ``LayerGradCam`` expects feature maps ``(N, C, ...)``; on tokens ``(N, T, C)`` it would average the wrong axis.
Here the layer is found from the gradient, and shown to Captum channels first through an identity module that is in the
forward only while Captum runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_transformer_attr.captum_compat import run_forward  # the targets of Captum, exactly
from captum_transformer_attr.comparison.float_view import FloatView
from captum_transformer_attr.errors import InputError

LARGEST_PREFIX = 16
"""Class, distillation and register tokens that are looked for before the patches."""


def channels_last(module: nn.Module, tokens: Tensor) -> bool:
    """Whether the channels of a module's input are its last axis: always, except for feature maps of a convolution."""
    return tokens.ndim == 3 or not isinstance(module, (nn.Conv2d, nn.BatchNorm2d))


def last_token_layer(view: FloatView, target: Any) -> nn.Module:
    """The last module whose input holds tokens that all still matter for the target.

    In a model that reads out one token, that is the last attention: behind it every other token's gradient is zero, and
    so would be its Grad-CAM. In a model that pools all tokens it is the final norm.

    Raises:
        InputError: if no module reads a sequence of tokens.
    """
    batch = view.features[0].shape[0]
    seen: list[tuple[nn.Module, Tensor]] = []

    def look(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = next((value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)), None)
        if given is not None and given.requires_grad and given.ndim in (3, 4) and given.shape[0] == batch:
            seen.append((module, given))

    handles = [
        module.register_forward_pre_hook(look, with_kwargs=True)
        for module in view.model.modules()
        if module is not view.model
    ]
    try:
        with torch.enable_grad():
            features = tuple(tensor.detach().requires_grad_() for tensor in view.features)
            score = run_forward(view, features, target, view.others or None)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise InputError("LayerGradCam: no module of the model reads a sequence of tokens; give layer=")
    gradients = torch.autograd.grad(score.sum(), [tokens for _, tokens in seen], allow_unused=True)
    shares = [
        _share_of_tokens(gradient, channels_last(module, tokens)) if gradient is not None else 0.0
        for (module, tokens), gradient in zip(seen, gradients, strict=True)
    ]
    # Heads are split into a fourth axis inside an attention, which looks like a grid: sequences come first.
    for axes in (3, 4):
        chosen = [(share, module) for share, (module, tokens) in zip(shares, seen, strict=True) if tokens.ndim == axes]
        best = max((share for share, _ in chosen), default=0.0)
        if best > 0:
            return [module for share, module in chosen if share >= best - 1e-6][-1]
    raise InputError("LayerGradCam: no module's tokens influence the target; give layer=")


def _share_of_tokens(gradient: Tensor, last: bool) -> float:
    return float((gradient.abs().sum(-1 if last else 1) > 0).float().mean())


@contextmanager
def channels_first(layer: nn.Module) -> Iterator[nn.Module]:
    """A module inside the forward whose output is the layer's input with channels on axis 1, for Captum to hook."""
    shown = nn.Identity()

    def pass_through(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        values = [*arguments, *keywords.values()]
        position = next(index for index, value in enumerate(values) if isinstance(value, Tensor))
        tokens = values[position]
        last = channels_last(module, tokens)
        moved = shown(tokens.movedim(-1, 1) if last else tokens)
        values[position] = moved.movedim(1, -1) if last else moved
        count = len(arguments)
        return tuple(values[:count]), dict(zip(keywords, values[count:], strict=True))

    handle = layer.register_forward_pre_hook(pass_through, with_kwargs=True)
    try:
        yield shown
    finally:
        handle.remove()


def spread_over_input(scores: Tensor, inputs: Tensor) -> Tensor:
    """Scores of a layer's tokens as scores of the input.

    Args:
        scores: ``(N, T)`` or a grid ``(N, h, w)``.
        inputs: Images ``(N, C, H, W)``, whose channels all get the interpolated map, or sequences ``(N, T, E)``.

    Raises:
        InputError: if the tokens do not fit the input.
    """
    if inputs.ndim == 4:
        grid = scores if scores.ndim == 3 else _patch_grid(scores, inputs.shape[2], inputs.shape[3])
        resized: Callable[..., Tensor] = nn.functional.interpolate
        return resized(grid[:, None], size=inputs.shape[2:], mode="bilinear", align_corners=False).expand_as(inputs)
    if scores.shape[1] != inputs.shape[1]:
        raise InputError(
            f"LayerGradCam: the layer has {scores.shape[1]} tokens, the input {inputs.shape[1]}; give layer="
        )
    return scores[..., None].expand_as(inputs)


def _patch_grid(scores: Tensor, height: int, width: int) -> Tensor:
    count = scores.shape[1]
    for prefix in range(min(LARGEST_PREFIX, count)):
        rows = math.isqrt((count - prefix) * height // width)
        if rows and (count - prefix) % rows == 0 and rows * width == (count - prefix) // rows * height:
            return scores[:, prefix:].reshape(len(scores), rows, -1)
    raise InputError(f"LayerGradCam: {count} tokens form no grid over a {height}x{width} image; give layer=")
