"""Which classes to explain, and what to call them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.loading import LoadedModel, class_index, short_name


def chosen_classes(loaded: LoadedModel, logits: Tensor, wanted: Sequence[str], top: int) -> list[int]:
    """Indices of the classes the user asks for, or of the top predictions.

    Args:
        loaded: The classifier.
        logits: ``(C,)`` of one input.
        wanted: What the user wrote after ``--target``.
        top: How many predictions, if nothing is wanted.

    Raises:
        InputError: if a class does not exist.
    """
    count = logits.shape[0]
    if not wanted:
        return logits.topk(min(top, count)).indices.tolist()
    indices = [class_index(text, loaded.class_names, count) for text in wanted]
    return list(dict.fromkeys(indices))


def labelled(loaded: LoadedModel, indices: Sequence[int]) -> list[str]:
    """A short, distinct label per class."""
    labels = [short_name(loaded.class_names[index]) if loaded.class_names else f"class {index}" for index in indices]
    return [
        f"{label} ({index})" if labels.count(label) > 1 else label for label, index in zip(labels, indices, strict=True)
    ]


def class_logits(output: Tensor, name: str) -> Tensor:
    """The logits ``(C,)`` of one input.

    Raises:
        InputError: if the model is no classifier or its output is NaN.
    """
    if output.ndim != 2:
        raise InputError(f"model {name} returns scores of shape {tuple(output.shape)}, not one score per class")
    if not output.isfinite().all():
        raise InputError(f"model {name} returns NaN or infinite scores for this input")
    return output[0]
