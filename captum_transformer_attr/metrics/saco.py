"""SaCo, the salience-guided faithfulness coefficient (Wu, Kang, Tang, Hong, Yan, CVPR 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.metrics._inputs import (
    Forward,
    Inputs,
    Target,
    check_choice,
    class_scores,
    class_targets,
    whole_number,
)
from captum_transformer_attr.metrics.accumulator import Accumulator, Bootstrap
from captum_transformer_attr.metrics.perturbation import MEASURES, OutputMeasure, RemovalChoice, measured
from captum_transformer_attr.metrics.pixels import removal_of
from captum_transformer_attr.metrics.ranking import ranks


def saco(
    forward: Forward,
    inputs: Inputs,
    attributions: Any,
    target: Target | None = None,
    *,
    groups: int = 10,
    removal: RemovalChoice = "mean",
    measure: OutputMeasure = "probability",
    seed: int = 0,
) -> Tensor:
    """Does more salience mean more influence? One number per example from -1 (the opposite) to 1 (always).

    The units are ranked by salience and cut into K groups G_1 ... G_K of equal size. Removing group i alone lowers the
    confidence of the explained class by d_i. Every pair i < j counts with the difference of the groups' salience,
    w = s(G_i) - s(G_j) >= 0, for the explanation if d_i >= d_j and against it otherwise (algorithm 1 of the paper):

        F = sum_ij (+w or -w) / sum_ij w

    s is the mean over a group where the paper has the sum: the same F for groups of equal size, and no false difference
    where the number of units cannot be divided by K.

    Args:
        forward: model or function from inputs to (N, classes); called groups + 1 times.
        inputs, attributions: as in `perturbation_curve`.
        target: the explained class; the predicted one by default, as in the paper.
        groups: K; the paper uses 10. Sequences with fewer tokens leave groups empty, which count for nothing.
        removal: the paper replaces pixels by the image's mean.
        measure: the confidence; `"sigmoid"` for models of independent labels.
        seed: orders units of equal salience, see `ranks`.

    Returns:
        (N,) coefficients; 0 where all groups are equally salient (a constant map claims nothing).

    Raises:
        InputError: fewer than two groups, shapes that do not fit, NaN attributions.
    """
    groups = whole_number(groups, "groups", 2)
    check_choice(measure, "measure", MEASURES)
    removal = removal_of(removal)
    units = removal.prepare(inputs, attributions)
    places = ranks(units.scores, removable=units.removable, seed=seed)
    # prepare() may have taken entries away that the model does not know, so even the clean pass goes through remove().
    clean = class_scores(forward, units.remove(torch.zeros_like(units.removable)), len(units.scores))
    target = clean.argmax(-1) if target is None else class_targets(target, len(clean), clean.device)
    confidence = measured(clean, target, measure)
    number = units.removable.sum(1, keepdim=True)
    drops, salience, empty = [], [], []
    for group in range(groups):
        members = (places >= number * group // groups) & (places < number * (group + 1) // groups)
        drops.append(confidence - measured(class_scores(forward, units.remove(members), len(clean)), target, measure))
        salience.append(units.scores.double().masked_fill(~members, 0).sum(1) / members.sum(1).clamp(min=1))
        empty.append(~members.any(1))
    return _coefficient(torch.stack(drops, 1), torch.stack(salience, 1), torch.stack(empty, 1))


class SacoScores(Accumulator):
    """The coefficient over a stream of batches; `compute` returns `saco`, an `Estimate`.

    Args:
        forward: as in `saco`, like the other options.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        groups: int = 10,
        removal: RemovalChoice = "mean",
        measure: OutputMeasure = "probability",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.forward = forward
        check_choice(measure, "measure", MEASURES)
        self.options: dict[str, Any] = {
            "groups": whole_number(groups, "groups", 2),
            "removal": removal_of(removal),
            "measure": measure,
            "seed": seed,
        }

    def protocol(self) -> dict[str, Any]:
        return {**self.options, **self.options["removal"].protocol()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"saco": ()}

    def update(self, inputs: Inputs, attributions: Any, target: Target | None = None) -> None:
        """Adds a batch."""
        self._add(saco=saco(self.forward, inputs, attributions, target, **self.options))

    def _summary(self, estimate: Bootstrap) -> dict[str, Any]:
        return {"saco": estimate(self._column("saco"))[0]}


def _coefficient(drops: Tensor, salience: Tensor, empty: Tensor) -> Tensor:
    first, second = torch.triu_indices(drops.shape[1], drops.shape[1], offset=1, device=drops.device)
    weight = (salience[:, first] - salience[:, second]).masked_fill(empty[:, first] | empty[:, second], 0)
    signed = torch.where(drops[:, first] >= drops[:, second], weight, -weight)
    total = weight.sum(1)
    # The means of equal numbers may differ by rounding; that is no claim about their order.
    claimed = total > 1e-12 * salience.abs().amax(1)
    return torch.where(claimed, signed.sum(1) / total, 0)
