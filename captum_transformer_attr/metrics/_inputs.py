"""What every metric does first: call the forward function, read the target's score, bring maps to the image's size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from captum_transformer_attr.errors import InputError, TargetError
from captum_transformer_attr.recording.outputs import unwrap

Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
Forward: TypeAlias = Callable[..., Any]
Target: TypeAlias = int | Sequence[int] | Tensor


def first_tensor(inputs: Inputs) -> Tensor:
    """The tensor whose first dimension counts the examples."""
    if isinstance(inputs, Tensor):
        return inputs
    tensors = [t for t in (inputs.values() if isinstance(inputs, Mapping) else inputs) if isinstance(t, Tensor)]
    if not tensors:
        raise InputError("inputs holds no tensor")
    return tensors[0]


def class_scores(forward: Forward, inputs: Inputs) -> Tensor:
    """Calls `forward` without gradients, as the attribution classes do (positional or keyword arguments).

    Returns:
        (N, classes), the logits of a ModelOutput unwrapped.

    Raises:
        InputError: the output holds no (N, classes) tensor.
    """
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            output = forward(**inputs)
        elif isinstance(inputs, Tensor):
            output = forward(inputs)
        else:
            output = forward(*inputs)
    output = unwrap(output)
    if output.ndim != 2:
        shape = tuple(output.shape)
        raise InputError(f"forward must return scores of shape (examples, classes), got {shape}; wrap it in a function")
    return output


def class_targets(target: Target, count: int, device: torch.device) -> Tensor:
    """One class index per example, (N,), from an int, a list or a tensor.

    Raises:
        InputError: anything else.
    """
    try:
        indices = torch.as_tensor(target, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"target must be an int, a list or a tensor of them, got {target!r}") from error
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise InputError(f"target must hold integers, got {indices.dtype}")
    if indices.ndim == 0:
        indices = indices.expand(count)
    if indices.shape != (count,):
        raise InputError(f"target must be one class for each of the {count} examples, got shape {tuple(indices.shape)}")
    return indices.long()


def target_scores(scores: Tensor, target: Tensor) -> Tensor:
    """The score of each example's class, (N,), of (N, classes).

    Raises:
        TargetError: the model has no such class.
    """
    count = scores.shape[1]
    wrong = target[(target < 0) | (target >= count)]
    if len(wrong):
        raise TargetError(f"target={int(wrong[0])}: the model has {count} classes, 0 to {count - 1}")
    return scores.gather(1, target[:, None])[:, 0]


def checked(attributions: Tensor, name: str = "attributions") -> Tensor:
    """Detached, at least float32 and free of NaN: a ranking of NaN would be silently arbitrary."""
    if not isinstance(attributions, Tensor):
        raise InputError(f"{name} must be a Tensor, got {type(attributions).__name__}")
    attributions = attributions.detach()
    if attributions.dtype != torch.float64:
        attributions = attributions.float()
    if attributions.isnan().any():
        example = int(attributions.isnan().flatten(1).any(1).nonzero()[0]) if attributions.ndim > 1 else 0
        raise InputError(f"{name} of example {example} hold NaN")
    return attributions


def spatial_maps(attributions: Tensor, size: Sequence[int]) -> Tensor:
    """One map per image: channels summed, other sizes (a patch grid) brought to `size` bilinearly as in the papers.

    Args:
        attributions: (N, H, W), (N, C, H, W) or a coarser grid of either kind.
        size: height and width in pixels.

    Returns:
        (N, height, width)
    """
    maps = checked(attributions)
    if maps.ndim not in (3, 4):
        raise InputError(f"attributions of images must be (N, H, W) or (N, C, H, W), got {tuple(maps.shape)}")
    maps = maps.sum(1) if maps.ndim == 4 else maps
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    return functional.interpolate(maps[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def boolean_masks(masks: Tensor, count: int) -> Tensor:
    """Object masks as (N, H, W) booleans; integers must be 0 or 1."""
    if not isinstance(masks, Tensor):
        raise InputError(f"masks must be a Tensor, got {type(masks).__name__}")
    if masks.ndim == 4 and masks.shape[1] == 1:
        masks = masks[:, 0]
    if masks.ndim != 3 or masks.shape[0] != count:
        raise InputError(f"masks must be (N, H, W) with N = {count}, got {tuple(masks.shape)}")
    if masks.dtype != torch.bool and not ((masks == 0) | (masks == 1)).all():
        raise InputError("masks must be boolean or hold only 0 and 1")
    return masks.bool()
