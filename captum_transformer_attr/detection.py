"""Weak segmentation from a detector: what every confident query looked at, as a mask (ICCV 2021, section 4.2)."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.methods.token_level import TokenAttribution
from captum_transformer_attr.recording.outputs import unwrap

Resolution = Literal["tokens", "pixels"]
Mask = npt.NDArray[np.bool_]
MASK_IOU = np.arange(20, 100, 5) / 100


@dataclass(frozen=True, eq=False)
class Segmentation:
    """One detected object.

    Attributes:
        query: which of the detector's queries found it.
        label: its class.
        score: the detector's confidence.
        box: left, top, right, bottom in pixels, None if the detector gives none.
        relevance: ``(h, w)`` over the encoder's grid, the padding of the image cut off.
        mask: ``(H, W)`` bool over the image.
    """

    query: int
    label: int
    score: float
    box: tuple[float, float, float, float] | None
    relevance: Tensor
    mask: Mask


def segmentation_masks(
    method: TokenAttribution,
    inputs: Mapping[str, Any],
    *,
    confidence: float = 0.5,
    image_sizes: Sequence[tuple[int, int]] | None = None,
    threshold_at: Resolution = "tokens",
) -> list[list[Segmentation]]:
    """A mask for every object that the detector is sure of, from the relevance map of the query that found it.

    The map is scaled to 0 … 255 and split by Otsu's threshold. All queries of all images share one recorded forward.

    Args:
        method: a token-level method around a Hugging Face detector, such as ``AttentionRelevance(detr)``.
        inputs: ``pixel_values`` ``(N, 3, H, W)`` and, where images are padded, ``pixel_mask`` ``(N, H, W)``.
        confidence: queries whose best class is more probable than this (published: 0.5).
        image_sizes: height and width of every mask; by default the size of the unpadded input.
        threshold_at: ``"tokens"`` splits the map on the encoder's grid and enlarges the result, as published;
            ``"pixels"`` enlarges the map first, for smoother outlines.

    Returns:
        For every image its objects, the surest first.

    Raises:
        InputError: for inputs without ``pixel_values``, sizes that do not match, or a model that is no detector.
    """
    if threshold_at not in ("tokens", "pixels"):
        raise InputError(f"threshold_at={threshold_at!r}: choose tokens or pixels")
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.ndim != 4:
        raise InputError("inputs: segmentation_masks needs 'pixel_values' of shape (N, 3, H, W)")
    if image_sizes is not None and len(image_sizes) != len(pixels):
        raise InputError(f"image_sizes: {len(image_sizes)} sizes for {len(pixels)} images")
    real = real_sizes(inputs, pixels)
    found, boxes = confident_queries(method, inputs, confidence)
    maps = relevance_maps(method, inputs, found)
    result = []
    for i, objects in enumerate(found):
        size = real[i] if image_sizes is None else tuple(image_sizes[i])
        here = []
        for k, (query, label, score) in enumerate(objects):
            relevance = without_padding(maps[k][i], real[i], pixels.shape[-2:])
            box = None if boxes is None else pixel_box(boxes[i, query], size)
            here.append(Segmentation(query, label, score, box, relevance, otsu_mask(relevance, size, threshold_at)))
        result.append(here)
    return result


def confident_queries(
    method: TokenAttribution, inputs: Mapping[str, Any], confidence: float
) -> tuple[list[list[tuple[int, int, float]]], Tensor | None]:
    """For every image (query, label, score) of the confident queries, the surest first; all boxes ``(N, queries, 4)``.

    Raises:
        InputError: if the output is no ``(N, queries, classes)``.
    """
    model = method.forward_func
    with torch.no_grad():
        output = model(**inputs)
    logits = unwrap(output, method.output)
    if logits.ndim != 3:
        raise InputError(f"the model's output has shape {tuple(logits.shape)}, a detector's is (N, queries, classes)")
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    # One output more than there are labels is "no object"; as many are independent of each other.
    scores = logits.sigmoid() if labels == logits.shape[-1] else logits.softmax(-1)[..., :-1]
    best, label = scores.max(-1)
    found = []
    for i in range(len(logits)):
        order = best[i].argsort(descending=True).tolist()
        found.append([(q, int(label[i, q]), float(best[i, q])) for q in order if best[i, q] > confidence])
    boxes = output.get("pred_boxes") if isinstance(output, Mapping) else None
    return found, boxes


def relevance_maps(
    method: TokenAttribution, inputs: Mapping[str, Any], found: list[list[tuple[int, int, float]]]
) -> list[Tensor]:
    """Maps ``(N, h, w)`` of the first, second, … object of every image; images with fewer objects repeat one."""
    count = max((len(objects) for objects in found), default=0)
    if count == 0:
        return []
    targets = [[(o[min(k, len(o) - 1)][:2] if o else (0, 0)) for o in found] for k in range(count)]
    return [scores["pixel_values"] for scores in method.attribute_tokens_each(inputs, targets)]


def real_sizes(inputs: Mapping[str, Any], pixels: Tensor) -> list[tuple[int, int]]:
    """Height and width of every image without its padding, which detectors put below and to the right."""
    mask = inputs.get("pixel_mask")
    if mask is None:
        return [(pixels.shape[-2], pixels.shape[-1])] * len(pixels)
    return [(int(m.any(1).sum()), int(m.any(0).sum())) for m in mask.bool()]


def without_padding(relevance: Tensor, real: tuple[int, int], canvas: Sequence[int]) -> Tensor:
    """The part of a map over the whole canvas that lies over the image; cells at the rim count if half of them does."""
    rows, columns = (max(1, round(n * r / c)) for n, r, c in zip(relevance.shape, real, canvas, strict=True))
    return relevance[:rows, :columns]


def otsu_mask(relevance: Tensor, size: Sequence[int], threshold_at: Resolution = "tokens") -> Mask:
    """Where a map ``(h, w)``, scaled to 0 … 255, is above its Otsu threshold, ``(H, W)``; nowhere for a flat map."""
    from skimage.filters import threshold_otsu

    values = relevance.detach().double().cpu()[None, None]
    if threshold_at == "pixels":
        values = F.interpolate(values, tuple(size), mode="bilinear", align_corners=False)
    low, high = values.min(), values.max()
    if not bool(high > low):
        return np.zeros(tuple(size), dtype=bool)
    grey = ((values - low) / (high - low) * 255).round()
    above = (grey > float(threshold_otsu(grey[0, 0].numpy().astype(np.uint8)))).double()
    if threshold_at == "tokens":
        above = F.interpolate(above, tuple(size), mode="bilinear", align_corners=False)
    inside: Mask = (above[0, 0] > 0.5).numpy()
    return inside


def pixel_box(box: Tensor, size: Sequence[int]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom in pixels from centre x, centre y, width, height as shares of the image."""
    x, y, width, height = box.tolist()
    rows, columns = size
    return (
        (x - width / 2) * columns,
        (y - height / 2) * rows,
        (x + width / 2) * columns,
        (y + height / 2) * rows,
    )


def coco_results(
    segmentations: Sequence[Sequence[Segmentation]],
    image_ids: Sequence[int],
    category_ids: Mapping[int, int] | None = None,
) -> list[dict[str, Any]]:
    """COCO's results format: one entry per object with run-length encoded mask, ready for ``COCO.loadRes``.

    Args:
        segmentations: from ``segmentation_masks``.
        image_ids: COCO's number of every image.
        category_ids: the detector's labels → COCO's categories; the same numbers by default.

    Raises:
        InputError: for another number of images.
    """
    from pycocotools import mask as coco_mask

    if len(image_ids) != len(segmentations):
        raise InputError(f"image_ids: {len(image_ids)} numbers for {len(segmentations)} images")
    entries = []
    for image_id, objects in zip(image_ids, segmentations, strict=True):
        for s in objects:
            encoded = coco_mask.encode(np.asfortranarray(s.mask.astype(np.uint8)))
            entry = {
                "image_id": image_id,
                "category_id": s.label if category_ids is None else category_ids[s.label],
                "score": s.score,
                "segmentation": {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")},
            }
            if s.box is not None:
                left, top, right, bottom = s.box
                entry["bbox"] = [left, top, right - left, bottom - top]
            entries.append(entry)
    return entries


def mask_average_precision(annotations: str | Path | Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> float:
    """COCO's average precision of masks, averaged over IoU 0.2, 0.25, …, 0.95 (ICCV 2021, section 4.2).

    Weak masks overlap less than drawn ones; COCO's own protocol starts at 0.5.

    Args:
        annotations: COCO's ``instances_*.json``, or its content.
        results: from ``coco_results``, for images of the annotations.

    Returns:
        A number between 0 and 1; NaN if nothing is annotated.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress
        truth = COCO(None if isinstance(annotations, Mapping) else str(annotations))
        if isinstance(annotations, Mapping):
            truth.dataset = copy.deepcopy(dict(annotations))
            truth.createIndex()
        if not results:
            return 0.0 if truth.anns else float("nan")
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(list(results))), "segm")
        evaluation.params.iouThrs = MASK_IOU
        evaluation.evaluate()
        evaluation.accumulate()
    # (IoU, recall, category, size, detections per image); −1 where a category has no object.
    precision = evaluation.eval["precision"][..., 0, -1]
    return float(precision[precision > -1].mean()) if (precision > -1).any() else float("nan")
