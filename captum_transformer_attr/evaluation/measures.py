"""The columns of a table: a metric, what it is asked about, and which direction is good."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from captum_transformer_attr.comparison import element_scores
from captum_transformer_attr.evaluation.batch import Batch, scatter, select
from captum_transformer_attr.metrics import (
    Accumulator,
    Estimate,
    MeanScore,
    PointingGame,
    RationaleScores,
    Removal,
    SacoScores,
    SegmentationScores,
    class_discriminativeness,
    curve_area,
    infidelity_and_sensitivity,
    perturbation_curve,
    word_scores,
)
from captum_transformer_attr.metrics.accumulator import Bootstrap

Forward = Callable[..., Any]
Explain = Callable[[Any, Any], Any]
"""Attributions for inputs and target."""
Order = Literal["positive", "negative"]
ORDERS: tuple[Order, ...] = ("positive", "negative")


@dataclass(frozen=True)
class Column:
    """One number of a table.

    Attributes:
        name: its heading, unique within a task.
        better: whether lower or higher is good; `""` for a reference such as the chance level.
        estimate: value, interval, and how many examples it rests on.
    """

    name: str
    better: Literal["lower", "higher", ""]
    estimate: Estimate


class Measure(ABC):
    """A metric as the harness runs it."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Unique within a task, also the key of the stored numbers."""

    @property
    @abstractmethod
    def roles(self) -> tuple[str, ...]:
        """Which classes must be explained for it, see `Batch.targets`."""

    @abstractmethod
    def accumulator(self, forward: Forward) -> Accumulator:
        """A fresh accumulator."""

    @abstractmethod
    def update(self, accumulator: Any, batch: Batch, maps: Mapping[str, Any], explain: Explain) -> None:
        """Adds a batch, given the attributions of every role; `explain` computes further ones."""

    @abstractmethod
    def columns(self, accumulator: Any, seed: int) -> list[Column]:
        """What goes into the table."""


class RoleCurves(Accumulator):
    """Perturbation curves of several explained classes; `compute` returns the area's `Estimate` by role.

    And as `clean` what the measure says about the whole input.
    """

    def __init__(self, forward: Forward, removal: Removal) -> None:
        super().__init__()
        self.forward = forward
        self.removal = removal

    def update(self, **curves: Tensor) -> None:
        """Adds (N, fractions) by role."""
        self._add(**curves)

    def _summary(self, estimate: Bootstrap) -> dict[str, Any]:
        areas = {role: estimate(curve_area(self._column(role), self.removal.fractions))[0] for role in self._columns}
        return {**areas, "clean": estimate(self._column(next(iter(self._columns)))[:, 0])[0]}


@dataclass(frozen=True)
class Perturbation(Measure):
    """Area under the perturbation curve, in one direction, a column per explained class.

    Attributes:
        roles: the classes whose attributions order the removal; where two are the same class the work is done once.
        asked: the role of the class that the measure looks at.
        entry: which input the attributions are of, where there are several.
        label: what is removed, if not single pixels or tokens by the published protocol.
    """

    removal: Removal
    order: Order
    roles: tuple[str, ...] = ("predicted", "label")
    asked: str = "label"
    measure: Any = "accuracy"
    entry: str | None = None
    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.label} {self.order}".strip()

    def accumulator(self, forward: Forward) -> RoleCurves:
        return RoleCurves(forward, self.removal)

    def update(self, accumulator: RoleCurves, batch: Batch, maps: Mapping[str, Any], explain: Explain) -> None:
        curves: dict[str, Tensor] = {}
        for role in self.roles:
            rows = torch.arange(len(batch), device=batch.logits.device)
            if curves:
                first = self.roles[0]
                rows = (batch.targets[role] != batch.targets[first]).nonzero().flatten()
                curves[role] = curves[first].clone()
            if len(rows) == 0:
                continue
            curve = perturbation_curve(
                accumulator.forward,
                select(batch.inputs, rows),
                entry_scores(maps[role], self.entry)[rows],
                batch.targets[self.asked][rows],
                order=self.order,
                removal=self.removal,
                measure=self.measure,
                clean_scores=batch.logits[rows],
            )
            curves[role] = scatter(curves[role], rows, curve) if role in curves else curve
        accumulator.update(**curves)

    def columns(self, accumulator: RoleCurves, seed: int) -> list[Column]:
        better: Literal["lower", "higher"] = "lower" if self.order == "positive" else "higher"
        areas = accumulator.compute(seed=seed)
        columns = [Column(f"{self.name}, {role}", better, areas[role]) for role in self.roles]
        if self.order == "positive" and not self.label:
            columns.append(Column(f"{self.measure} on the whole input", "", areas["clean"]))
        return columns


@dataclass(frozen=True)
class Saco(Measure):
    """Salience-guided faithfulness coefficient of the predicted class."""

    removal: Removal
    measure: Any = "probability"
    entry: str | None = None
    name: str = "SaCo"
    roles: tuple[str, ...] = ("predicted",)

    def accumulator(self, forward: Forward) -> SacoScores:
        return SacoScores(forward, removal=self.removal, measure=self.measure)

    def update(self, accumulator: SacoScores, batch: Batch, maps: Mapping[str, Any], explain: Explain) -> None:
        (role,) = self.roles
        accumulator.update(batch.inputs, entry_scores(maps[role], self.entry), batch.targets[role])

    def columns(self, accumulator: SacoScores, seed: int) -> list[Column]:
        return [Column(self.name, "higher", accumulator.compute(seed=seed)["saco"])]


@dataclass(frozen=True)
class Pointing(Measure):
    """Pointing game and mass in the mask, with the subset whose object does not cover the image centre.

    Attributes:
        role: the explained class, whose object has a mask in the batch.
        to_maps: how the attributions become maps (N, H, W); a detour for inputs that are regions, not pixels.
    """

    role: str = "label"
    to_maps: Callable[[Any], Tensor] = field(default_factory=lambda: entry_scores)
    name: str = "pointing"

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.role,)

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
class Corners(Measure):
    """Positive relevance in the four corner squares (a quarter of the side each, a quarter of the area together) over their share of the area.

    1 is even; a hierarchical model whose heat sits in the image corners has far more.
    """

    role: str = "label"
    name: str = "corners"

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.role,)

    def accumulator(self, forward: Forward) -> MeanScore:
        return MeanScore()

    def update(self, accumulator: MeanScore, batch: Batch, maps: Mapping[str, Any], explain: Explain) -> None:
        accumulator.update(corners=corner_mass(entry_scores(maps[self.role])))

    def columns(self, accumulator: MeanScore, seed: int) -> list[Column]:
        return [Column("corner mass / area", "lower", accumulator.compute(seed=seed)["corners"])]


def corner_mass(maps: Tensor) -> Tensor:
    """Share of the positive mass of maps (N, H, W) in the corner squares, over their share of the area, (N,); 0 for a map without positive mass."""
    height, width = maps.shape[1] // 4, maps.shape[2] // 4
    inside = torch.zeros(maps.shape[1:], dtype=torch.bool, device=maps.device)
    for rows in (slice(0, height), slice(maps.shape[1] - height, None)):
        for columns in (slice(0, width), slice(maps.shape[2] - width, None)):
            inside[rows, columns] = True
    mass = maps.clamp(min=0)
    total = mass.flatten(1).sum(1)
    share = (mass * inside).flatten(1).sum(1) / torch.where(total == 0, 1, total)
    return share / inside.float().mean()


@dataclass(frozen=True)
class Segmentation(Measure):
    """Pixel accuracy, mean IoU and average precision."""

    role: str = "predicted"
    threshold: float | str = "mean"
    name: str = "segmentation"

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.role,)

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
class CaptumMeasure(Measure):
    """Captum's infidelity (with its optimal scaling) and maximum sensitivity; images only.

    Costs ten attributions and twenty forwards per example.
    """

    name: str = "captum"
    roles: tuple[str, ...] = ("predicted",)

    def accumulator(self, forward: Forward) -> CaptumAccumulator:
        return CaptumAccumulator(forward)

    def update(self, accumulator: CaptumAccumulator, batch: Batch, maps: Mapping[str, Any], explain: Explain) -> None:
        (role,) = self.roles
        accumulator.update(explain, batch.inputs, maps[role], batch.targets[role])

    def columns(self, accumulator: CaptumAccumulator, seed: int) -> list[Column]:
        result = accumulator.compute(seed=seed)
        return [
            Column("infidelity", "lower", result["infidelity"]),
            Column("max. sensitivity", "lower", result["sensitivity_max"]),
        ]


class CaptumAccumulator(Accumulator):
    """Infidelity and sensitivity over a stream of batches."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.forward = forward

    def update(self, explain: Explain, inputs: Any, attributions: Any, target: Tensor) -> None:
        """Adds a batch."""
        bound = _Bound(self.forward, explain)
        result = infidelity_and_sensitivity(bound, inputs, target, attributions=attributions)
        self._add(**result._asdict())

    def _summary(self, estimate: Bootstrap) -> dict[str, Any]:
        return {name: estimate(self._column(name))[0] for name in self._columns}


@dataclass(frozen=True)
class _Bound:
    """A method on a model in the form of a Captum attribution object."""

    forward_func: Forward
    explain: Explain

    def attribute(self, inputs: Any, target: Any = None, additional_forward_args: Any = None) -> Any:
        # sensitivity_max hands a single input over as a tuple of one.
        single = isinstance(inputs, tuple) and len(inputs) == 1
        return (self.explain(inputs[0], target),) if single else self.explain(inputs, target)


@dataclass(frozen=True)
class Rationale(Measure):
    """Token F1 and AUPRC against human rationales; the score of a word is the highest of its pieces."""

    k: tuple[int, ...]
    role: str = "label"
    entry: str = "input_ids"
    name: str = "rationale"

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.role,)

    def accumulator(self, forward: Forward) -> RationaleScores:
        return RationaleScores(self.k)

    def update(self, accumulator: RationaleScores, batch: Batch, maps: Mapping[str, Any], explain: Explain) -> None:
        assert batch.words is not None
        rows = entry_scores(maps[self.role], self.entry)
        words, texts = batch.words, range(len(batch))
        scores = [word_scores(rows[i], words.of_tokens[i], words.count[i]) for i in texts]
        accumulator.update(scores, words.rationales)

    def columns(self, accumulator: RationaleScores, seed: int) -> list[Column]:
        result = accumulator.compute(seed=seed)
        by_k = [Column(f"F1@{k}", "higher", estimate) for k, estimate in result["token_f1"].items()]
        return [Column("AUPRC", "higher", result["auprc"]), *by_k]


def entry_scores(attributions: Any, entry: str | None = None) -> Tensor:
    """One score per pixel or token, (N, H, W) or (N, T), of one entry of an attribution."""
    if isinstance(attributions, Mapping):
        attributions = attributions[entry] if entry is not None else next(iter(attributions.values()))
    elif isinstance(attributions, tuple):
        attributions = attributions[0]
    return element_scores(attributions)
