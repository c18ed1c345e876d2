"""Images and their classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from captum_transformer_attr.cli.cases import Case, ImageView
from captum_transformer_attr.cli.kinds.classes import class_questions
from captum_transformer_attr.comparison import element_scores
from captum_transformer_attr.loading import ImageModel, read_image
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
    questions, predicted = class_questions(loaded, pixels[None].to(device), targets, top)
    view = ImageView("image", loaded.preprocessing.picture(pixels), image_scores)
    return Case(Path(path).name, questions, (view,), f"predicted: {predicted}")


def image_scores(attributions: Any, label: str = "") -> FloatArray:
    """The map ``(H, W)`` of the picture among the inputs."""
    maps = attributions["pixel_values"] if isinstance(attributions, dict) else attributions
    return element_scores(maps)[0].cpu().numpy()
