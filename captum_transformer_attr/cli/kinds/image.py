"""Images and their classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from captum_transformer_attr.cli.cases import Case, ImageView
from captum_transformer_attr.cli.kinds.classes import chosen_classes, class_logits, labelled
from captum_transformer_attr.comparison import element_scores
from captum_transformer_attr.loading import ImageModel, read_image
from captum_transformer_attr.recording.outputs import unwrap
from captum_transformer_attr.visualization.report import FloatArray


def image_case(loaded: ImageModel, path: str, targets: Sequence[str], top: int, device: torch.device) -> Case:
    """Read a picture, predict, and say which classes to explain.

    Args:
        loaded: The classifier.
        path: Of the picture.
        targets: Classes the user wants; the ``top`` predictions if empty.
        top: How many predictions.
        device: Where the model is.

    Raises:
        InputError: if the picture cannot be read or a class does not exist.
    """
    pixels = loaded.preprocessing(read_image(path))
    inputs = pixels[None].to(device)
    with torch.no_grad():
        output = unwrap(loaded.model(inputs))
    logits = class_logits(output, loaded.name)
    indices = chosen_classes(loaded, logits, targets, top)
    labels = labelled(loaded, indices)
    probabilities = loaded.probabilities(logits[None])[0]
    return Case(
        title=Path(path).name,
        inputs=inputs,
        targets=tuple(zip(labels, indices, strict=True)),
        views=(ImageView("image", loaded.preprocessing.picture(pixels), _map),),
        probabilities={label: float(probabilities[index]) for label, index in zip(labels, indices, strict=True)},
        note=f"predicted: {labelled(loaded, [int(logits.argmax())])[0]}",
    )


def _map(attributions: Any) -> FloatArray:
    return element_scores(attributions)[0].cpu().numpy()
