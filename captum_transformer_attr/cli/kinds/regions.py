"""Answers to a question about image regions: LXMERT and VisualBERT read the features that a detector made of them."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captum_transformer_attr.cli.cases import Case, ImageView, TextView
from captum_transformer_attr.cli.kinds.classes import class_questions, model_scores
from captum_transformer_attr.cli.kinds.text import encode, shortened
from captum_transformer_attr.comparison import element_scores
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.loading import RegionAnswerModel
from captum_transformer_attr.loading.words import Merge
from captum_transformer_attr.visualization.report import FloatArray

CANVAS = 256
"""Pixels along the sides of the empty picture that boxes are shown on if there is no other."""
FORMAT = "a .npy array (regions, features), or an .npz file with 'features' and optionally 'boxes' and 'image'"


@dataclass(frozen=True)
class Regions:
    """What a detector found in one image.

    Attributes:
        features: ``(K, D)``.
        boxes: ``(K, 4)``: left, top, right, bottom as shares of the image, or None.
        image: ``(H, W, 3)`` uint8 to draw on; empty if none was given.
    """

    features: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.float32] | None
    image: npt.NDArray[np.uint8]

    def painted(self, scores: FloatArray) -> FloatArray:
        """Scores ``(K,)`` over the picture: every pixel has the strongest score among the boxes that cover it."""
        assert self.boxes is not None
        height, width = self.image.shape[:2]
        canvas = np.zeros((height, width))
        corners = np.round(self.boxes * (width, height, width, height)).astype(int)
        for index in np.abs(scores).argsort(kind="stable"):
            left, top, right, bottom = corners[index]
            canvas[top : max(bottom, top + 1), left : max(right, left + 1)] = scores[index]
        return canvas


def read_regions(path: str) -> Regions:
    """Read a file of region features.

    Raises:
        InputError: if there is no such file, or it holds something else.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        entries = {name: loaded[name] for name in loaded.files} if hasattr(loaded, "files") else {"features": loaded}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = "there is no such file" if not Path(path).is_file() else "it is no NumPy file"
        raise InputError(f"region features {path}: {reason}; give {FORMAT}") from error
    features, boxes = entries.get("features"), entries.get("boxes")
    if features is None or features.ndim != 2 or not len(features) or not np.issubdtype(features.dtype, np.number):
        raise InputError(f"region features {path}: no numbers of shape (regions, features); give {FORMAT}")
    if not np.isfinite(features).all():
        raise InputError(f"region features {path}: 'features' holds NaN or infinite values")
    image = entries.get("image")
    if image is None:
        image = np.full((CANVAS, CANVAS, 3), 230, dtype=np.uint8)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"region features {path}: 'image' must be (height, width, 3) uint8, got {image.shape}")
    if boxes is not None:
        boxes = _shares(boxes, len(features), image if "image" in entries else None, path)
    return Regions(features.astype(np.float32), boxes, image)


def _shares(boxes: Any, count: int, image: npt.NDArray[np.uint8] | None, path: str) -> npt.NDArray[np.float32]:
    """Boxes as shares of the image; pixels are recognised by being above 1.

    Raises:
        InputError: for boxes of another shape, outside the image, or in pixels without the image.
    """
    if boxes.shape != (count, 4):
        raise InputError(f"region features {path}: 'boxes' must be ({count}, 4), got {boxes.shape}")
    boxes = boxes.astype(np.float32)
    if np.abs(boxes).max() > 1 and image is not None:
        height, width = image.shape[:2]
        boxes = boxes / np.array([width, height, width, height], dtype=np.float32)
    # A detector may go a pixel over the rim.
    inside = (boxes > -0.02).all() and (boxes < 1.02).all() and (boxes[:, 2:] >= boxes[:, :2]).all()
    if not inside:
        raise InputError(
            f"region features {path}: 'boxes' must be left, top, right, bottom as shares of the image, "
            "or in pixels with the 'image' they lie in"
        )
    return boxes.clip(0, 1)


def region_cases(
    loaded: RegionAnswerModel,
    path: str,
    texts: Sequence[str],
    targets: Sequence[str],
    top: int,
    device: torch.device,
    merge: Merge,
) -> list[Case]:
    """Read region features; every question about them is a case. Arguments as in ``answer_cases``.

    Raises:
        InputError: if there is no question, the file cannot be read or does not fit the model, or an answer does not
            exist.
    """
    if not texts:
        raise InputError(f"model {loaded.name} answers questions about image regions: ask one with --text")
    regions = read_regions(path)
    name, width = loaded.features
    if regions.features.shape[1] != width:
        raise InputError(
            f"region features {path}: {regions.features.shape[1]} features per region, {loaded.name} reads {width}"
        )
    visual: dict[str, Tensor] = {name: torch.from_numpy(regions.features)[None].to(device)}
    if loaded.reads_boxes:
        if regions.boxes is None:
            raise InputError(
                f"region features {path}: {loaded.name} reads 'boxes' as well; give an .npz file with them"
            )
        visual["visual_pos"] = torch.from_numpy(regions.boxes)[None].to(device)
    else:
        ones = torch.ones(1, len(regions.features), dtype=torch.long, device=device)
        visual |= {"visual_attention_mask": ones, "visual_token_type_ids": ones}
    view: ImageView | TextView
    if regions.boxes is not None:
        view = ImageView("regions", regions.image, lambda found, label: regions.painted(_scores(found, name)))
    else:
        numbers = tuple(f"region {index}" for index in range(len(regions.features)))
        view = TextView("regions", numbers, lambda found, label: _scores(found, name))
    cases = []
    for text in texts:
        encoded = encode(loaded.tokenizer, text, device, merge)
        inputs = {**encoded.inputs, **visual}
        questions, predicted = class_questions(_named(loaded, inputs), inputs, targets, top)
        views = (TextView("question", encoded.words, encoded.scores), view)
        title = f"{Path(path).name}: {shortened(text)}"
        cases.append(Case(title, questions, views, f"answer: {predicted}{encoded.note()}"))
    return cases


def _scores(attributions: Any, name: str) -> FloatArray:
    return element_scores(attributions[name])[0].cpu().numpy()


def _named(loaded: RegionAnswerModel, inputs: dict[str, Tensor]) -> RegionAnswerModel:
    """Without the names of the answers where the configuration has others than the model (LXMERT's has two)."""
    outputs = model_scores(loaded, inputs).shape[-1]
    fits = loaded.class_names is None or len(loaded.class_names) == outputs
    return loaded if fits else replace(loaded, class_names=None)
