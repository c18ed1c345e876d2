"""Measures of where in a picture the relevance lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from captum_transformer_attr.evaluation.batch import Batch
from captum_transformer_attr.evaluation.measures.measure import (
    Column,
    Explain,
    Forward,
    Measure,
    OneClassMeasure,
    entry_scores,
)
from captum_transformer_attr.metrics import MeanScore, PointingGame, SegmentationScores, class_discriminativeness


@dataclass(frozen=True)
class Pointing(OneClassMeasure):
    """Pointing game and mass in the mask, with the subset whose object does not cover the image centre.

    Attributes:
        role: the explained class, whose object has a mask in the batch.
        to_maps: how the attributions become maps (N, H, W); a detour for inputs that are regions, not pixels.
    """

    needs_masks: ClassVar[bool] = True
    role: str = "label"
    to_maps: Callable[[Any], Tensor] = field(default_factory=lambda: entry_scores)
    name: str = "pointing"

    def accumulator(self, forward: Forward) -> PointingGame:
        return PointingGame()

    def update(self, accumulator: PointingGame, batch: Batch, maps: Mapping[str, Any], explain: Explain) -> None:
        accumulator.update(self.to_maps(maps[self.role]), batch.masks[self.role])

    def columns(self, accumulator: PointingGame, seed: int) -> list[Column]:
        result = accumulator.compute(seed=seed)
        return [
            Column("pointing", "higher", result["hit"]),
            Column("pointing, off-centre objects", "higher", result["hit_off_center"]),
            Column("mass in mask", "higher", result["mass"]),
            Column("mass in mask, off-centre", "higher", result["mass_off_center"]),
            Column("chance", "", result["chance"]),
            Column("chance, off-centre", "", result["chance_off_center"]),
        ]


@dataclass(frozen=True)
class Segmentation(OneClassMeasure):
    """Pixel accuracy, mean IoU and average precision."""

    needs_masks: ClassVar[bool] = True
    role: str = "predicted"
    threshold: float | str = "mean"
    name: str = "segmentation"

    def accumulator(self, forward: Forward) -> SegmentationScores:
        return SegmentationScores(threshold=self.threshold)

    def update(self, accumulator: SegmentationScores, batch: Batch, maps: Mapping[str, Any], explain: Explain) -> None:
        accumulator.update(entry_scores(maps[self.role]), batch.masks[self.role])

    def columns(self, accumulator: SegmentationScores, seed: int) -> list[Column]:
        result = accumulator.compute(seed=seed)
        return [
            Column("pixel accuracy", "higher", result["pixel_accuracy"]),
            Column("mIoU", "higher", result["mean_iou"]),
            Column("AP", "higher", result["average_precision"]),
        ]


@dataclass(frozen=True)
class Discriminativeness(Measure):
    """Whether the maps of two classes differ, and prefer their own objects where both have masks."""

    roles: tuple[str, ...] = ("predicted", "other")
    name: str = "discriminativeness"

    def accumulator(self, forward: Forward) -> MeanScore:
        return MeanScore()

    def update(self, accumulator: MeanScore, batch: Batch, maps: Mapping[str, Any], explain: Explain) -> None:
        both = torch.stack([entry_scores(maps[role]) for role in self.roles], dim=1)
        masked = all(role in batch.masks for role in self.roles)
        masks = torch.stack([batch.masks[role] for role in self.roles], dim=1) if masked else None
        result = class_discriminativeness(both, masks)
        scores = {"separation": result.separation}
        accumulator.update(**scores, **({} if result.localization is None else {"localization": result.localization}))

    def columns(self, accumulator: MeanScore, seed: int) -> list[Column]:
        result = accumulator.compute(seed=seed)
        columns = [Column("class separation", "higher", result["separation"])]
        if "localization" in result:
            columns.append(Column("right object (of two)", "higher", result["localization"]))
        return columns


@dataclass(frozen=True)
class Corners(OneClassMeasure):
    """Positive relevance in the four corner squares over their share of the area, for images without masks.

    A square's side is a quarter of the image's; the four make up a quarter of the area. 1 is even; a hierarchical model
    whose heat sits in the image corners has far more.
    """

    role: str = "label"
    name: str = "corners"

    def accumulator(self, forward: Forward) -> MeanScore:
        return MeanScore()

    def update(self, accumulator: MeanScore, batch: Batch, maps: Mapping[str, Any], explain: Explain) -> None:
        accumulator.update(corners=corner_mass(entry_scores(maps[self.role])))

    def columns(self, accumulator: MeanScore, seed: int) -> list[Column]:
        return [Column("corner mass / area", "lower", accumulator.compute(seed=seed)["corners"])]


def corner_mass(maps: Tensor) -> Tensor:
    """Share of the positive mass of maps (N, H, W) in the corner squares, over their share of the area.

    Returns:
        (N,); 0 for a map without positive mass.
    """
    height, width = maps.shape[1] // 4, maps.shape[2] // 4
    inside = torch.zeros(maps.shape[1:], dtype=torch.bool, device=maps.device)
    for rows in (slice(0, height), slice(maps.shape[1] - height, None)):
        for columns in (slice(0, width), slice(maps.shape[2] - width, None)):
            inside[rows, columns] = True
    mass = maps.clamp(min=0)
    total = mass.flatten(1).sum(1)
    share = (mass * inside).flatten(1).sum(1) / torch.where(total == 0, 1, total)
    return share / inside.float().mean()
