"""Captum's general methods on transformers: same call, same output kinds as our classes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from captum.attr import (
    FeatureAblation,
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    Occlusion,
    Saliency,
)
from torch import Tensor, nn

from captum_transformer_attr.comparison.float_view import FloatView
from captum_transformer_attr.comparison.grad_cam_layer import channels_first, last_token_layer, spread_over_input
from captum_transformer_attr.errors import InputError

GRID = 14
"""Perturbation methods divide an image into about this many squares per side, as a ViT of patch size 16 does."""
PERTURBATIONS_PER_FORWARD = 8


def _call(view: FloatView) -> dict[str, Any]:
    return {"additional_forward_args": view.others or None}


def _leaves(view: FloatView) -> tuple[Tensor, ...]:
    """The features as tensors that already require gradients, which Captum warns about otherwise."""
    return tuple(tensor.detach().requires_grad_() for tensor in view.features)


def saliency(view: FloatView, target: Any) -> tuple[Tensor, ...]:
    """Captum's ``Saliency``: magnitude of the gradient."""
    return Saliency(view).attribute(_leaves(view), target=target, **_call(view))


def input_x_gradient(view: FloatView, target: Any) -> tuple[Tensor, ...]:
    """Captum's ``InputXGradient``."""
    return InputXGradient(view).attribute(_leaves(view), target=target, **_call(view))


def integrated_gradients(view: FloatView, target: Any, *, n_steps: int = 50) -> tuple[Tensor, ...]:
    """Captum's ``IntegratedGradients`` from the zero input (the mean colour; the zero embedding)."""
    batch = view.features[0].shape[0]
    return IntegratedGradients(view).attribute(
        view.features, target=target, n_steps=n_steps, internal_batch_size=max(16, batch), **_call(view)
    )


def gradient_shap(view: FloatView, target: Any, *, n_samples: int = 20, stdevs: float = 0.1) -> tuple[Tensor, ...]:
    """Captum's ``GradientShap`` with the zero input as baseline; the same random numbers in every call."""
    baselines = tuple(torch.zeros_like(tensor[:1]) for tensor in view.features)
    with _same_random_numbers():
        return GradientShap(view).attribute(
            view.features, baselines, n_samples=n_samples, stdevs=stdevs, target=target, **_call(view)
        )


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Seeded generators inside, the process's own state outside; Captum draws from torch and from NumPy."""
    state = np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            np.random.set_state(state)


def occlusion(view: FloatView, target: Any) -> tuple[Tensor, ...]:
    """Captum's ``Occlusion``: a square of an image, or one token, set to zero at a time.

    Each input on its own: for several at once Captum 0.9 makes masks on the CPU, wherever the inputs are.
    """
    return tuple(_occlusion_of(view, target, i) for i in range(len(view.features)))


def _occlusion_of(view: FloatView, target: Any, i: int) -> Tensor:
    """Of the i-th input; the other inputs are arguments that stay as they are."""

    def forward(tensor: Tensor, *others: Any) -> Tensor:
        output: Tensor = view(*others[:i], tensor, *others[i:])
        return output

    others = (*view.features[:i], *view.features[i + 1 :], *view.others)
    window = _window(view.features[i])
    scores: Tensor = Occlusion(forward).attribute(
        view.features[i],
        window,
        strides=window,
        target=target,
        perturbations_per_eval=PERTURBATIONS_PER_FORWARD,
        additional_forward_args=others or None,
    )
    return scores


def feature_ablation(view: FloatView, target: Any) -> tuple[Tensor, ...]:
    """Captum's ``FeatureAblation`` over the squares of an image or the tokens of a sequence."""
    masks, first = [], 0
    for tensor in view.features:
        mask = _groups(tensor) + first
        masks.append(mask)
        first = int(mask.max()) + 1
    return FeatureAblation(view).attribute(
        view.features,
        target=target,
        feature_mask=tuple(masks),
        perturbations_per_eval=PERTURBATIONS_PER_FORWARD,
        **_call(view),
    )


def layer_grad_cam(view: FloatView, target: Any, *, layer: nn.Module | str | None = None) -> tuple[Tensor, ...]:
    """Captum's ``LayerGradCam`` on the input of ``layer`` (or its path); by default the last whose tokens all matter.

    Only the first explained input gets scores: a layer belongs to one sequence of tokens.

    Raises:
        InputError: if the model has no such layer.
    """
    chosen = last_token_layer(view, target) if layer is None else _module(view.model, layer)
    with channels_first(chosen) as shown:
        cam = LayerGradCam(view, shown).attribute(
            _leaves(view), target=target, relu_attributions=True, attr_dim_summation=True, **_call(view)
        )
    scores = cam[0] if isinstance(cam, tuple) else cam
    first = spread_over_input(scores[:, 0].detach(), view.features[0])
    return first, *(torch.zeros_like(tensor) for tensor in view.features[1:])


def _module(model: nn.Module, layer: nn.Module | str) -> nn.Module:
    if isinstance(layer, nn.Module):
        return layer
    modules = dict(model.named_modules())
    if layer not in modules:
        near = difflib.get_close_matches(str(layer), modules, n=3, cutoff=0.3)
        hint = f"; similar: {', '.join(near)}" if near else ""
        raise InputError(f"method LayerGradCam: the model has no layer {layer!r}{hint}")
    return modules[layer]


def _window(tensor: Tensor) -> tuple[int, ...]:
    if tensor.ndim == 4:
        side = max(1, min(tensor.shape[2:]) // GRID)
        return tensor.shape[1], side, side
    return (1, *tensor.shape[2:])


def _groups(tensor: Tensor) -> Tensor:
    """Index of the square or token that each element belongs to, broadcastable to the tensor."""
    if tensor.ndim == 4:
        side = max(1, min(tensor.shape[2:]) // GRID)
        rows, columns = (torch.arange(length, device=tensor.device) // side for length in tensor.shape[2:])
        return (rows[:, None] * (int(columns.max()) + 1) + columns)[None, None]
    tokens = torch.arange(tensor.shape[1], device=tensor.device)
    return tokens.view(1, -1, *[1] * (tensor.ndim - 2))


CAPTUM_METHODS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "IntegratedGradients": integrated_gradients,
    "InputXGradient": input_x_gradient,
    "Saliency": saliency,
    "GradientShap": gradient_shap,
    "LayerGradCam": layer_grad_cam,
    "Occlusion": occlusion,
    "FeatureAblation": feature_ablation,
}
