"""Objects that a detector finds in an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from captum_transformer_attr.cli.cases import Case, ImageView, Question
from captum_transformer_attr.cli.kinds.classes import class_labels
from captum_transformer_attr.cli.kinds.image import image_scores
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.loading import DetectionModel, class_index, read_image

CONFIDENT = 0.5
MOST_OBJECTS = 12


def detection_case(loaded: DetectionModel, path: str, targets: Sequence[str], device: torch.device) -> Case:
    """Read a picture, detect, and say which queries to explain.

    Args:
        loaded: The detector.
        path: Of the picture.
        targets: Classes the user wants: the query surest of each. If empty, the queries above a confidence of 0.5, or
            the surest one if there is none.
        device: Where the model is.

    Raises:
        InputError: if the picture cannot be read, a class does not exist, or the model gives NaN.
    """
    pixels = loaded.preprocessing(read_image(path))
    inputs = pixels[None].to(device)
    with torch.no_grad():
        output = loaded.model(inputs)
    if not output.logits.isfinite().all():
        raise InputError(f"model {loaded.name} returns NaN or infinite scores for this input")
    confidence = object_confidence(output.logits, loaded)[0]
    found = _wanted(loaded, confidence, targets) if targets else _confident(confidence)
    names = class_labels(loaded, sorted({label for _, label in found}))
    by_class = dict(zip(sorted({label for _, label in found}), names, strict=True))
    questions = tuple(
        Question(f"{by_class[label]}, query {query}", (query, label), inputs, float(confidence[query, label]))
        for query, label in found
    )
    boxes = {
        question.label: _corners(output.pred_boxes[0, query])
        for question, (query, _) in zip(questions, found, strict=True)
    }
    view = ImageView("image", loaded.preprocessing.picture(pixels), image_scores, boxes)
    return Case(Path(path).name, questions, (view,), _summary(confidence))


def object_confidence(logits: Tensor, loaded: DetectionModel) -> Tensor:
    """Confidence of every query in every real class.

    A detector with one logit more than it has classes (DETR) shares its confidence between them and "nothing"; one
    without decides about every class on its own.

    Args:
        logits: ``(N, queries, classes)`` or ``(N, queries, classes + 1)``.
        loaded: The detector.
    """
    if loaded.class_names is not None and logits.shape[-1] == len(loaded.class_names):
        return logits.sigmoid()
    return logits.softmax(-1)[..., :-1]


def _summary(confidence: Tensor) -> str:
    count = int((confidence.amax(-1) > CONFIDENT).sum())
    if not count:
        return f"no object found with more than {CONFIDENT:.0%} confidence"
    return f"{count} object{'' if count == 1 else 's'} found"


def _confident(confidence: Tensor) -> list[tuple[int, int]]:
    best = confidence.max(-1)
    order = best.values.argsort(descending=True).tolist()
    found = [query for query in order if best.values[query] > CONFIDENT][:MOST_OBJECTS] or order[:1]
    return [(query, int(best.indices[query])) for query in found]


def _wanted(loaded: DetectionModel, confidence: Tensor, targets: Sequence[str]) -> list[tuple[int, int]]:
    labels = dict.fromkeys(class_index(text, loaded.class_names, confidence.shape[-1]) for text in targets)
    return [(int(confidence[:, label].argmax()), label) for label in labels]


def _corners(box: Tensor) -> tuple[float, float, float, float]:
    """Left, top, right, bottom as shares of the picture, from its centre, width and height."""
    x, y, width, height = box.tolist()
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2
