"""Tasks on pictures: a classifier and a reader of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_transformer_attr.datasets import DatasetError, ImageExample, Reader, Skipped
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.evaluation.batch import Batch, runner_up
from captum_transformer_attr.evaluation.measures import (
    ORDERS,
    CaptumMeasure,
    Corners,
    Discriminativeness,
    Measure,
    Perturbation,
    Pointing,
    Saco,
    Segmentation,
)
from captum_transformer_attr.evaluation.task import Task, batched, chosen
from captum_transformer_attr.loading import ImageModel
from captum_transformer_attr.metrics import PixelRemoval

METRICS = (
    "perturbation",
    "perturbation-squares",
    "saco",
    "pointing",
    "corners",
    "segmentation",
    "discriminativeness",
    "captum",
)


class ImageTask(Task):
    """An image classifier on labelled pictures.

    The whole picture is squashed to the model's input (the protocol of Chefer et al. 2021, and masks stay where their
    objects are); masks follow by nearest neighbour.

    Args:
        name, title: see `Task`.
        model: loaded with its preprocessing.
        reader: pictures with labels, and with regions where a metric needs masks.
        metrics: of `METRICS`.
        indices: which examples.
        mask_role: whose object the regions are: `"label"`, or `"predicted"` where the data set names no class.
        square: edge in pixels of the squares of `"perturbation-squares"`, the model's patch size by default.
    """

    def __init__(
        self,
        name: str,
        title: str,
        model: ImageModel,
        reader: Reader[ImageExample],
        metrics: Sequence[str],
        indices: Sequence[int],
        *,
        mask_role: str = "label",
        square: int | None = None,
    ) -> None:
        self.loaded = model
        self.reader = reader
        self.metrics = tuple(metrics)
        self.mask_role = mask_role
        self.square = patch_size(model.model) if square is None else square
        super().__init__(name, title, model.model, self._measures(), indices)
        placed = [measure.name for measure in self.measures if measure.needs_masks]
        if placed and not reader.has_regions:
            raise InputError(f"{', '.join(placed)}: {name} does not say where in a picture its objects are")

    def _measures(self) -> list[Measure]:
        colours: dict[str, Any] = {"mean": self.loaded.preprocessing.mean, "std": self.loaded.preprocessing.std}
        black = PixelRemoval("black", **colours)
        squares = PixelRemoval("black", square=self.square, **colours)
        available: dict[str, list[Measure]] = {
            "perturbation": [Perturbation(black, order) for order in ORDERS],
            "perturbation-squares": [Perturbation(squares, order, ("predicted",), label="squares") for order in ORDERS],
            "saco": [Saco(PixelRemoval("mean"))],
            "pointing": [Pointing(self.mask_role)],
            "corners": [Corners(self.mask_role)],
            "segmentation": [Segmentation(self.mask_role)],
            "discriminativeness": [Discriminativeness()],
            "captum": [CaptumMeasure()],
        }
        return chosen(available, self.metrics)

    @property
    def skipped(self) -> list[Skipped]:
        return self.reader.skipped

    @property
    def source(self) -> tuple[str, ...]:
        return self.reader.source

    def batches(self, batch_size: int) -> Iterator[Batch]:
        examples = (example for _, example in self.reader.examples(self.indices))
        return map(self._batch, batched(examples, batch_size))

    def _batch(self, examples: list[ImageExample]) -> Batch:
        pixels = torch.stack([self.loaded.preprocessing(Image.fromarray(e.image)) for e in examples]).to(self.device)
        with torch.no_grad():
            output = self.model(pixels)
        logits = output if isinstance(output, Tensor) else output["logits"]
        predicted = logits.argmax(1)
        targets = {"predicted": predicted, "other": runner_up(logits, predicted)}
        if any("label" in measure.known_roles for measure in self.measures):
            targets["label"] = self._labels(examples, logits)
        masks = {}
        if any(measure.needs_masks for measure in self.measures):
            size = (int(pixels.shape[2]), int(pixels.shape[3]))
            masks[self.mask_role] = torch.stack([resized_mask(e.mask(), size) for e in examples]).to(self.device)
        return Batch([e.name for e in examples], pixels, logits, targets, masks)

    def _labels(self, examples: list[ImageExample], logits: Tensor) -> Tensor:
        for example in examples:
            if example.label is None or not 0 <= example.label < logits.shape[1]:
                raise DatasetError(
                    f"{example.name} has label {example.label}, the model has {logits.shape[1]} classes; "
                    "metrics that need a label cannot be computed"
                )
        return torch.tensor([example.label for example in examples], device=logits.device)

    def description(self) -> dict[str, Any]:
        return {
            **super().description(),
            "model": self.loaded.name,
            "metrics": self.metrics,
            "mask_role": self.mask_role,
            "square": self.square,
        }


def patch_size(model: Any) -> int:
    """Edge of a transformer's patches in pixels, by the conventions of timm and Hugging Face; 16 where unknown."""
    embedding, config = getattr(model, "patch_embed", None), getattr(model, "config", None)
    size: Any = getattr(embedding, "patch_size", None) or getattr(config, "patch_size", None) or 16
    return int(size if isinstance(size, int) else size[0])


def resized_mask(mask: np.ndarray, size: tuple[int, int]) -> Tensor:
    """A boolean mask at another size (height, width), nearest neighbour.

    A region so small that no sampled pixel falls on it keeps the pixel at its middle.
    """
    height, width = size
    resized = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    result = torch.from_numpy(np.array(resized)).bool()
    if mask.any() and not result.any():
        rows, columns = np.nonzero(mask)
        row = int(rows.mean() * height / mask.shape[0])
        column = int(columns.mean() * width / mask.shape[1])
        result[row, column] = True
    return result
