"""What every metric does first: call the forward function, read the target's score, bring maps to the image's size."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from captum_transformer_attr.errors import InputError, TargetError
from captum_transformer_attr.recording.outputs import unwrap

Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
Forward: TypeAlias = Callable[..., Any]
Target: TypeAlias = int | Sequence[int] | Tensor


def check_tensor(value: Any, name: str) -> None:
    """Refuses lists and arrays, whose devices and shapes cannot be asked."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a Tensor, got {type(value).__name__}")


def check_choice(value: Any, name: str, choices: Collection[str]) -> None:
    """Refuses an unknown name."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def whole_number(value: Any, name: str, least: int | None = None) -> int:
    """An int, of whatever library."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise InputError(f"{name} must be a whole number, got {value!r}") from error
    if least is not None and number < least:
        raise InputError(f"{name} must be at least {least}, got {number}")
    return number


def numbers(value: Any, name: str) -> Tensor:
    """One number or a sequence of them, finite, as float64."""
    try:
        result = torch.as_tensor(value, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be a number or several numbers, got {value!r}") from error
    if not result.isfinite().all():
        raise InputError(f"{name} must be finite, got {value!r}")
    return result


def per_example(value: Any, name: str, count: int, device: torch.device) -> Tensor:
    """A number or one for each example, (N,) float64."""
    result = numbers(value, name).to(device)
    if result.shape not in ((), (count,)):
        shape = tuple(result.shape)
        raise InputError(f"{name} must be a number or one for each of the {count} examples, got shape {shape}")
    return result.expand(count)


def first_tensor(inputs: Inputs) -> Tensor:
    """The tensor whose first dimension counts the examples."""
    entries = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
    tensors = [t for t in entries if isinstance(t, Tensor) and t.ndim]
    if not tensors:
        raise InputError("inputs must be a tensor of examples, or a tuple or mapping that holds one")
    return tensors[0]


def class_scores(forward: Forward, inputs: Inputs, count: int) -> Tensor:
    """Calls `forward` without gradients, as the attribution classes do (positional or keyword arguments).

    Returns:
        (N, classes), the logits of a ModelOutput unwrapped.

    Raises:
        InputError: the output holds no (N, classes) tensor, or NaN.
    """
    if not callable(forward):
        raise InputError(f"forward must be a model or a function, got {type(forward).__name__}")
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            output = forward(**inputs)
        elif isinstance(inputs, Tensor):
            output = forward(inputs)
        else:
            output = forward(*inputs)
    output = unwrap(output)
    if output.ndim != 2 or len(output) != count:
        shape = tuple(output.shape)
        raise InputError(
            f"forward must return scores of shape (examples, classes) for {count} examples, got {shape}; "
            "wrap it in a function"
        )
    check_scores(output, "the output of forward")
    return output


def check_scores(scores: Tensor, name: str) -> None:
    """Refuses scores of classes, (N, classes), that have no highest one.

    The largest of numbers with a NaN would be reported as class 0, whatever the model knows. Single classes may be
    ruled out by -inf.
    """
    if not scores.is_floating_point() or not scores.shape[1]:
        raise InputError(f"{name} must hold floating scores, got {scores.dtype} of shape {tuple(scores.shape)}")
    undecided = ~scores.amax(1).isfinite()
    if undecided.any():
        example = int(undecided.nonzero()[0])
        raise InputError(f"{name} is NaN or infinite for example {example}: no class can be told")


def given_scores(scores: Any, name: str, count: int) -> Tensor:
    """The model's answer as a caller knows it, (N, classes)."""
    check_tensor(scores, name)
    if scores.ndim != 2 or len(scores) != count:
        raise InputError(f"{name} must be (N, classes) with N = {count}, got {tuple(scores.shape)}")
    check_scores(scores, name)
    return scores.detach()


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
    """Detached, at least float32 and finite: a ranking of NaN and a share of infinity are silently arbitrary."""
    check_tensor(attributions, name)
    if attributions.is_complex():
        raise InputError(f"{name} must be real, got {attributions.dtype}")
    attributions = attributions.detach()
    if attributions.dtype != torch.float64:
        attributions = attributions.float()
    wrong = ~attributions.isfinite()
    if wrong.any():
        example = int(wrong.nonzero()[0, 0]) if wrong.ndim else 0
        found = "NaN" if attributions[wrong].isnan().any() else "infinite values"
        raise InputError(f"{name} of example {example} hold {found}")
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
    if 0 in (*maps.shape[1:], *size):
        raise InputError(f"attributions {tuple(maps.shape)} on images of {tuple(size)} pixels: there is no pixel")
    maps = maps.sum(1) if maps.ndim == 4 else maps
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    return functional.interpolate(maps[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def boolean_masks(masks: Tensor, count: int, name: str = "masks") -> Tensor:
    """Object masks as (N, H, W) booleans; integers must be 0 or 1."""
    check_tensor(masks, name)
    if masks.ndim == 4 and masks.shape[1] == 1:
        masks = masks[:, 0]
    if masks.ndim != 3 or masks.shape[0] != count:
        raise InputError(f"{name} must be (N, H, W) with N = {count}, got {tuple(masks.shape)}")
    if masks.dtype != torch.bool and not ((masks == 0) | (masks == 1)).all():
        raise InputError(f"{name} must be boolean or hold only 0 and 1")
    return masks.bool()


def maps_and_masks(attributions: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Maps of the masks' size and boolean masks on the maps' device, (N, H, W) each."""
    check_tensor(attributions, "attributions")
    masks = boolean_masks(masks, len(attributions)).to(attributions.device)
    return spatial_maps(attributions, masks.shape[1:]), masks
