"""Which classes to explain, and what to call them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.cli.cases import Question
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.loading import LoadedModel, class_index, short_name
from captum_transformer_attr.recording.outputs import unwrap
from captum_transformer_attr.recording.targets import Contrast


def model_scores(loaded: LoadedModel, inputs: Any) -> Tensor:
    """What the model says about its inputs, without gradients.

    Raises:
        InputError: if it is NaN or infinite.
    """
    with torch.no_grad():
        scores = unwrap(loaded.model(**inputs) if isinstance(inputs, dict) else loaded.model(inputs))
    if not scores.isfinite().all():
        raise InputError(f"model {loaded.name} returns NaN or infinite scores for this input")
    return scores


def class_questions(
    loaded: LoadedModel, inputs: Any, wanted: Sequence[str], top: int
) -> tuple[tuple[Question, ...], str]:
    """The classes the user asks for, or the top predictions.

    Args:
        loaded: A classifier.
        inputs: A batch of one.
        wanted: What the user wrote after ``--target``.
        top: How many predictions, if nothing is wanted.

    Returns:
        One question per class, and the name of the predicted class.

    Raises:
        InputError: if a class does not exist, or the model is no classifier.
    """
    output = model_scores(loaded, inputs)
    if output.ndim != 2:
        raise InputError(f"model {loaded.name} returns scores of shape {tuple(output.shape)}, not one score per class")
    logits, probabilities = output[0], loaded.probabilities(output)[0].tolist()
    count = logits.shape[0]
    if loaded.class_names and len(loaded.class_names) != count:
        raise InputError(
            f"model {loaded.name} has {count} classes, but {len(loaded.class_names)} class names; "
            "give theirs with --labels"
        )
    chosen: list[tuple[int, ...]] = [(index,) for index in logits.topk(min(top, count)).indices.tolist()]
    if wanted:
        chosen = [
            tuple(class_index(name, loaded.class_names, count) for name in contrasted(text))
            for text in dict.fromkeys(wanted)
        ]
        check_differ(chosen, wanted)
    names = dict(zip(range(count), class_labels(loaded, range(count)), strict=True))
    questions = {
        " rather than ".join(names[index] for index in indices): Question(
            " rather than ".join(names[index] for index in indices),
            indices[0] if len(indices) == 1 else Contrast(*indices),
            inputs,
            probabilities[indices[0]] if len(indices) == 1 else None,
        )
        for indices in chosen
    }
    return tuple(questions.values()), names[int(logits.argmax())]


def contrasted(text: str) -> list[str]:
    """What the user asks for: one name, or the two names of ``"this > that"``.

    Raises:
        InputError: if there are more.
    """
    parts = [part.strip() for part in text.split(">")]
    if len(parts) > 2 or not all(parts):
        raise InputError(f'target {text!r}: write one class, or two as "this > that"')
    return parts


def check_differ(chosen: Sequence[Sequence[int]], wanted: Sequence[str]) -> None:
    """Refuse the difference of a class and itself, which is zero.

    Raises:
        InputError: naming what the user wrote.
    """
    for indices, text in zip(chosen, dict.fromkeys(wanted), strict=True):
        if len(indices) == 2 and indices[0] == indices[1]:
            raise InputError(f"target {text!r} is the difference of a class and itself")


def class_labels(loaded: LoadedModel, indices: Sequence[int]) -> list[str]:
    """A short, distinct label per class."""
    names = [short_name(loaded.class_names[index]) if loaded.class_names else f"class {index}" for index in indices]
    count = Counter(names)
    return [f"{name} ({index})" if count[name] > 1 else name for name, index in zip(names, indices, strict=True)]
