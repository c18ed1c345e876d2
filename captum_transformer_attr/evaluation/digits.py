"""The task on digit scenes: every digit's pixels are known exactly, and several classes are in every picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from captum_transformer_attr.digit_scenes import DigitScenes, load_swin, load_vit, make_scenes, model_info
from captum_transformer_attr.evaluation.batch import Batch
from captum_transformer_attr.evaluation.measures import (
    ORDERS,
    Discriminativeness,
    Measure,
    Perturbation,
    Pointing,
    Saco,
    Segmentation,
)
from captum_transformer_attr.evaluation.task import Task, batched, chosen
from captum_transformer_attr.metrics import PixelRemoval

METRICS = ("perturbation", "perturbation-squares", "saco", "pointing", "segmentation", "discriminativeness")


class DigitTask(Task):
    """An embedded model on scenes with at least two digits; two of them are explained, `"label"` and `"other"`.

    The classes are independent, so the perturbation measures follow the sigmoid of the explained digit.

    Args:
        architecture: `"vit"` or `"swin"`.
        count: number of scenes.
        half: `"even"`, `"odd"` or `"all"`: which of them are used.
        seed: of the scenes (writers of the test split, whom the models have not seen).
    """

    def __init__(
        self,
        architecture: Literal["vit", "swin"],
        count: int,
        half: str = "all",
        seed: int = 0,
        metrics: Sequence[str] = METRICS,
    ) -> None:
        self.info = model_info(architecture)
        self.seed = seed
        self.metrics = tuple(metrics)
        model = load_vit() if architecture == "vit" else load_swin()
        indices = range(count)[{"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}[half]]
        name = f"digit-scenes-{architecture}"
        kind = "ViT" if architecture == "vit" else "Swin"
        super().__init__(name, f"Embedded {kind} on digit scenes (exact masks)", model, self._measures(), indices)
        self._scenes: DigitScenes | None = None

    def _measures(self) -> list[Measure]:
        colours: dict[str, Any] = {"mean": self.info.mean, "std": self.info.std}
        black, squares = PixelRemoval("black", **colours), PixelRemoval("black", square=4, **colours)
        available: dict[str, list[Measure]] = {
            "perturbation": [Perturbation(black, order, ("label",), measure="sigmoid") for order in ORDERS],
            "perturbation-squares": [
                Perturbation(squares, order, ("label",), measure="sigmoid", label="squares") for order in ORDERS
            ],
            "saco": [Saco(PixelRemoval("mean"), measure="sigmoid", role="label")],
            "pointing": [Pointing()],
            "segmentation": [Segmentation("label")],
            "discriminativeness": [Discriminativeness(("label", "other"))],
        }
        return chosen(available, self.metrics)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        if self._scenes is None:
            self._scenes = make_scenes(max(self.indices) + 1, "test", self.seed)
        scenes = self._scenes
        for indices in batched(self.indices, batch_size):
            rows = torch.tensor(indices)
            inputs = self.info.normalize(scenes.images[rows]).to(self.device)
            with torch.no_grad():
                logits = self.model(inputs)
            present = [labels.nonzero().flatten().tolist() for labels in scenes.labels[rows]]
            # Which two of up to four digits turns with the scene, so that no digit is preferred.
            turned = [
                digits[row % len(digits) :] + digits[: row % len(digits)]
                for row, digits in zip(indices, present, strict=True)
            ]
            targets = {role: torch.tensor([d[place] for d in turned]) for place, role in enumerate(("label", "other"))}
            masks = {role: scenes.masks[rows, target] for role, target in targets.items()}
            names = [f"scene {row}" for row in indices]
            yield Batch(names, inputs, logits, targets, masks).to(self.device)

    def description(self) -> dict[str, Any]:
        return {**super().description(), "metrics": self.metrics, "seed": self.seed}
