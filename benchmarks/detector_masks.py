"""Masks from the relevance of a detector's queries, held against the exact pixels of the digits they found."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Tensor

from benchmarks.trained_models.digit_detector import STRIDE, detector_inputs, load_digit_detr
from benchmarks.vqa_methods import detector_methods
from captum_transformer_attr.comparison import Method, element_scores
from captum_transformer_attr.detection import otsu_mask
from captum_transformer_attr.digit_scenes import DigitScenes, make_scenes
from captum_transformer_attr.evaluation.run import Advance
from captum_transformer_attr.evaluation.store import Progress, Store
from captum_transformer_attr.evaluation.task import weight_sum
from captum_transformer_attr.metrics import Estimate, MeanScore

SEED = 20_000
COLUMNS = (
    "IoU, tokens",
    "IoU, pixels",
    "IoU, pixels of √map",
    "precision",
    "recall",
    "best IoU",
    "AP",
    "mass on digit",
)


def measure_masks(
    count: int, store: Store, advance: Advance, confidence: float = 0.5, batch: int = 8
) -> dict[str, dict[str, Estimate]]:
    """Per method the mean over rightly named digits of every column.

    IoU, precision and recall are those of the Otsu mask; ``tokens`` thresholds on the encoder's grid, ``pixels`` after
    enlarging the map. Best IoU (over all thresholds) and average precision do not depend on a threshold.

    Args:
        count: scenes. store: keeps finished scenes. advance: told method, scenes done and their number.
        confidence: of the queries that are explained. batch: scenes between two savings.
    """
    model = load_digit_detr()
    scenes = make_scenes(count, seed=SEED)
    inputs = detector_inputs(scenes.images)["pixel_values"]
    found = objects(model, inputs, scenes, confidence)
    description = {"task": "detr", "count": count, "confidence": confidence, "weights": weight_sum(model)}
    result = {}
    for method in detector_methods():
        scores = MeanScore()
        progress = Progress({"masks": scores})
        store.load(description, method.name, progress)
        for i in range(progress.done, count):
            for query, label in found[i]:
                relevance = explained(method, model, inputs[i : i + 1], query, label)
                scores.update(**measured(relevance, scenes.masks[i, label].bool().numpy()))
            progress.done = i + 1
            advance(method.name, progress.done, count)
            if progress.done % batch == 0 or progress.done == count:
                store.save(description, method.name, progress)
        advance(method.name, count, count)
        result[method.name] = scores.compute()
    return result


@torch.no_grad()
def objects(model: Any, inputs: Tensor, scenes: DigitScenes, confidence: float) -> list[list[tuple[int, int]]]:
    """Per scene (query, label) of the confident queries whose digit is there."""
    best, label = model(pixel_values=inputs).logits.softmax(-1)[..., :-1].max(-1)
    return [
        [
            (query, int(label[i, query]))
            for query in (best[i] >= confidence).nonzero().flatten().tolist()
            if scenes.labels[i, int(label[i, query])]
        ]
        for i in range(len(inputs))
    ]


def explained(method: Method, model: Any, pixels: Tensor, query: int, label: int) -> Tensor:
    """The map ``(H, W)`` of one detection."""
    return element_scores(method.attribute(model, {"pixel_values": pixels}, (query, label))["pixel_values"])[0]


def measured(relevance: Tensor, truth: np.ndarray) -> dict[str, Tensor]:
    """The columns for one map ``(H, W)`` and the digit's pixels."""
    coarse = F.avg_pool2d(relevance[None], STRIDE)[0]
    mask = otsu_mask(relevance, relevance.shape, "pixels")
    flat, true = relevance.flatten().double().numpy(), truth.flatten()
    # The mask at every threshold: hits among the k strongest pixels.
    hits = np.cumsum(true[np.argsort(-flat, kind="stable")])
    strongest = np.arange(1, len(flat) + 1)
    positive = np.clip(flat, 0, None)
    values = (
        iou(otsu_mask(coarse, relevance.shape, "tokens"), truth),
        iou(mask, truth),
        iou(otsu_mask(relevance.clamp(min=0).sqrt(), relevance.shape, "pixels"), truth),
        (mask & truth).sum() / max(mask.sum(), 1),
        (mask & truth).sum() / truth.sum(),
        (hits / (strongest + truth.sum() - hits)).max(),
        average_precision_score(true, flat),
        positive[true].sum() / (positive.sum() or 1),
    )
    return {name: torch.tensor([float(value)]) for name, value in zip(COLUMNS, values, strict=True)}


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union."""
    return float((mask & truth).sum() / max((mask | truth).sum(), 1))
