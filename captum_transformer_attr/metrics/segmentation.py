"""Attribution maps as segmentations of the object (Chefer et al., CVPR 2021, section 4)."""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.metrics._inputs import boolean_masks, maps_and_masks
from captum_transformer_attr.metrics.accumulator import Accumulator, Bootstrap


class SegmentationResult(NamedTuple):
    """Scores over a data set, all in [0, 1].

    Attributes:
        pixel_accuracy: share of all pixels on the right side.
        mean_iou: intersection over union, summed over the data set, mean of object and background.
        average_precision: mean over images of the average precision of [map, 1 - map] for [object, background].
    """

    pixel_accuracy: float
    mean_iou: float
    average_precision: float


def segmentation_scores(
    attributions: Tensor, masks: Tensor, *, threshold: float | str = "mean", valid: Tensor | None = None
) -> SegmentationResult:
    """Pixel accuracy, mean IoU and average precision of a batch taken as the whole data set.

    A map is brought to [0, 1] by its minimum and maximum; a pixel is object where it exceeds the threshold. A constant
    map becomes all zero: background everywhere.

    Args:
        attributions: (N, H, W), (N, C, H, W) or a coarser grid, interpolated bilinearly to the masks.
        masks: (N, H, W), the object's pixels.
        threshold: `"mean"`, the map's own mean (as published), `"otsu"` (needs scikit-image), or a number of [0, 1].
        valid: (N, H, W), pixels that count; borders marked "ignore" in a data set do not.

    Raises:
        InputError: shapes that do not fit, NaN attributions, an unknown threshold.

    Needs torchmetrics.
    """
    scores = SegmentationScores(threshold=threshold)
    scores.update(attributions, masks, valid=valid)
    return SegmentationResult(*(float(value) for value in _data_set_scores(scores.rows().numpy())))


class SegmentationScores(Accumulator):
    """The same over a stream of batches; accuracy and IoU are ratios of sums over everything seen.

    `compute` returns `pixel_accuracy`, `mean_iou` and `average_precision`.
    """

    def __init__(self, *, threshold: float | str = "mean") -> None:
        super().__init__()
        named = isinstance(threshold, str) and threshold in ("mean", "otsu")
        if not named and not (isinstance(threshold, Real) and 0 <= threshold <= 1):
            raise InputError(f'threshold must be "mean", "otsu" or a number of [0, 1], got {threshold!r}')
        self.threshold = threshold if isinstance(threshold, str) else float(threshold)

    def protocol(self) -> dict[str, Any]:
        return {"threshold": self.threshold}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"counts": (4,), "average_precision": ()}

    def update(self, attributions: Tensor, masks: Tensor, *, valid: Tensor | None = None) -> None:
        """Adds a batch."""
        from torchmetrics.functional.classification import binary_average_precision, binary_stat_scores

        maps, masks = maps_and_masks(attributions, masks)
        if not len(maps):
            raise InputError("attributions hold no example")
        counted = torch.ones_like(masks) if valid is None else _counted(valid, masks)
        maps = _unit_range(maps)
        predicted = maps > self._thresholds(maps)
        counts, precision = [], []
        # Image by image: torchmetrics' samplewise statistics fail on a batch of one.
        for scores, guess, mask, use in zip(maps, predicted, masks, counted, strict=True):
            counts.append(binary_stat_scores(guess[use].long(), mask[use].long())[:4])
            one = scores[use]
            both, truth = torch.cat([one, 1 - one]), torch.cat([mask[use], ~mask[use]]).long()
            precision.append(binary_average_precision(both, truth))
        self._add(counts=torch.stack(counts), average_precision=torch.stack(precision))

    def rows(self) -> Tensor:
        """(N, 5): true positives, false positives, true negatives, false negatives, average precision."""
        return torch.cat([self._column("counts"), self._column("average_precision")[:, None]], dim=1)

    def _summary(self, estimate: Bootstrap) -> dict[str, Any]:
        estimates = estimate(self.rows(), _data_set_scores)
        return dict(zip(SegmentationResult._fields, estimates, strict=True))

    def _thresholds(self, maps: Tensor) -> Tensor:
        if self.threshold == "mean":
            return maps.mean((1, 2), keepdim=True)
        if self.threshold == "otsu":
            from skimage.filters import threshold_otsu

            # 256 levels, as the published code makes of a map before Otsu's method.
            levels = [threshold_otsu((one * 255).round().byte().cpu().numpy()) / 255 for one in maps]
            return maps.new_tensor(levels).view(-1, 1, 1)
        return maps.new_full((len(maps), 1, 1), float(self.threshold))


def _counted(valid: Tensor, masks: Tensor) -> Tensor:
    """`valid` as booleans."""
    counted = boolean_masks(valid, len(masks), "valid").to(masks.device)
    if counted.shape != masks.shape:
        raise InputError(f"valid must be {tuple(masks.shape)} as the masks are, got {tuple(counted.shape)}")
    ignored = ~counted.flatten(1).any(1)
    if ignored.any():
        raise InputError(f"valid leaves no pixel of example {int(ignored.nonzero()[0])}; leave the example out")
    return counted


def _unit_range(maps: Tensor) -> Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0)


def _data_set_scores(rows: np.ndarray) -> np.ndarray:
    true_pos, false_pos, true_neg, false_neg, _ = rows.sum(axis=0)
    wrong = false_pos + false_neg
    with np.errstate(invalid="ignore"):
        # A data set without any object pixel, predicted or true, has no object IoU: NaN, not 0.
        iou = (np.divide(true_pos, true_pos + wrong) + np.divide(true_neg, true_neg + wrong)) / 2
        accuracy = (true_pos + true_neg) / (true_pos + true_neg + wrong)
    return np.array([accuracy, iou, rows[:, 4].mean()])
