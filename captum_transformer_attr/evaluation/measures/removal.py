"""Measures that remove parts of the input and ask the model again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from captum_transformer_attr.evaluation.batch import Batch, once_per_class, select
from captum_transformer_attr.evaluation.measures.measure import (
    Column,
    Explain,
    Forward,
    Measure,
    OneClassMeasure,
    entry_scores,
)
from captum_transformer_attr.metrics import Accumulator, Removal, SacoScores, curve_area, perturbation_curve
from captum_transformer_attr.metrics.accumulator import Bootstrap
from captum_transformer_attr.metrics.perturbation import Order, OutputMeasure

ORDERS: tuple[Order, ...] = ("positive", "negative")


class RoleCurves(Accumulator):
    """Perturbation curves of several explained classes; `compute` returns the area's `Estimate` by role.

    And as `clean` what the measure says about the whole input.
    """

    def __init__(self, forward: Forward, removal: Removal) -> None:
        super().__init__()
        self.forward = forward
        self.removal = removal

    def protocol(self) -> dict[str, Any]:
        return self.removal.protocol()

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
        asked: the role of the class whose score is read.
        measure: what is read, see `perturbation_curve`.
        entry: which input the attributions are of, where there are several.
        label: what is removed, if not single pixels or tokens by the published protocol.
    """

    removal: Removal
    order: Order
    roles: tuple[str, ...] = ("predicted", "label")
    asked: str = "label"
    measure: OutputMeasure = "accuracy"
    entry: str | None = None
    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.label} {self.order}".strip()

    @property
    def known_roles(self) -> tuple[str, ...]:
        return (*self.roles, self.asked)

    def accumulator(self, forward: Forward) -> RoleCurves:
        return RoleCurves(forward, self.removal)

    def update(self, accumulator: RoleCurves, batch: Batch, maps: Mapping[str, Any], explain: Explain) -> None:
        def curve(role: str, rows: Tensor) -> Tensor:
            return perturbation_curve(
                accumulator.forward,
                select(batch.inputs, rows),
                entry_scores(maps[role], self.entry)[rows],
                batch.targets[self.asked][rows],
                order=self.order,
                removal=self.removal,
                measure=self.measure,
                clean_scores=batch.logits[rows],
            )

        accumulator.update(**once_per_class(batch, self.roles, curve))

    def columns(self, accumulator: RoleCurves, seed: int) -> list[Column]:
        better: Literal["lower", "higher"] = "lower" if self.order == "positive" else "higher"
        areas = accumulator.compute(seed=seed)
        columns = [Column(f"{self.name}, {role}", better, areas[role]) for role in self.roles]
        if self.order == "positive" and not self.label:
            columns.append(Column(f"{self.measure} on the whole input", "", areas["clean"]))
        return columns


@dataclass(frozen=True)
class Saco(OneClassMeasure):
    """Salience-guided faithfulness coefficient."""

    removal: Removal
    measure: OutputMeasure = "probability"
    entry: str | None = None
    name: str = "SaCo"
    role: str = "predicted"

    def accumulator(self, forward: Forward) -> SacoScores:
        return SacoScores(forward, removal=self.removal, measure=self.measure)

    def update(self, accumulator: SacoScores, batch: Batch, maps: Mapping[str, Any], explain: Explain) -> None:
        accumulator.update(batch.inputs, entry_scores(maps[self.role], self.entry), batch.targets[self.role])

    def columns(self, accumulator: SacoScores, seed: int) -> list[Column]:
        return [Column(self.name, "higher", accumulator.compute(seed=seed)["saco"])]
