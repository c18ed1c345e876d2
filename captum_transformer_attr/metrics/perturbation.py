"""Perturbation curves: what the model still knows when the most, or the least, relevant part is gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.metrics._inputs import (
    Forward,
    Inputs,
    Target,
    check_choice,
    check_tensor,
    class_scores,
    class_targets,
    given_scores,
    numbers,
    target_scores,
)
from captum_transformer_attr.metrics.accumulator import Accumulator, Bootstrap
from captum_transformer_attr.metrics.pixels import removal_of
from captum_transformer_attr.metrics.ranking import ranks
from captum_transformer_attr.metrics.removal import Removal

Order = Literal["positive", "negative"]
OutputMeasure = Literal["accuracy", "probability", "sigmoid", "logit"]
MEASURES: tuple[str, ...] = get_args(OutputMeasure)
RemovalChoice = Removal | Literal["black", "mean", "blur"]


def perturbation_curve(
    forward: Forward,
    inputs: Inputs,
    attributions: Any,
    target: Target,
    *,
    order: Order = "positive",
    removal: RemovalChoice = "black",
    fractions: Sequence[float] | None = None,
    measure: OutputMeasure = "accuracy",
    seed: int = 0,
    clean_scores: Tensor | None = None,
) -> Tensor:
    """Removes a growing part of the input in the order of its relevance and asks the model each time.

    The protocols of Chefer et al.: CVPR 2021 section 4 (pixels) and ICCV 2021 section 5 (tokens and regions).

    Args:
        forward: model or function from inputs to (N, classes); called once per fraction, without gradients.
        inputs: images (N, C, H, W), ids (N, T), or a mapping of keyword arguments.
        attributions: what an attribution class returned for them, or its `attribute_tokens`.
        target: the class of every example that the measure looks at; the ground truth for the accuracy of the papers,
            whatever class the attributions explain.
        order: `"positive"` removes the most relevant first (a good explanation: a curve that falls early),
            `"negative"` the least relevant first (a curve that stays up).
        removal: a `PixelRemoval` or `TokenRemoval`; the name of a pixel baseline stands for images in [0, 1].
        fractions: parts removed, in rising order; by default the published steps, 0 to 0.9 for pixels and 0 to 1 for
            tokens.
        measure: `"accuracy"` (1 where the target is the top class), or the target's softmax `"probability"`, its
            `"sigmoid"` (models of independent labels), or its `"logit"`.
        seed: orders units of equal relevance, see `ranks`.
        clean_scores: (N, classes), the model's answer to the whole inputs if it is known; saves a forward.

    Returns:
        (N, fractions), a curve per example. Their mean is the published curve.

    Raises:
        InputError: shapes that do not fit, NaN attributions, fractions outside [0, 1], unknown options.
    """
    check_protocol(order, measure)
    removal = removal_of(removal)
    fractions = checked_fractions(removal.fractions if fractions is None else fractions)
    units = removal.prepare(inputs, attributions)
    count = len(units.scores)
    target = class_targets(target, count, units.scores.device)
    clean = None if clean_scores is None else given_scores(clean_scores, "clean_scores", count)
    places = ranks(units.scores, descending=order == "positive", removable=units.removable, seed=seed)
    steps = []
    for fraction in fractions:
        if fraction == 0 and clean is not None:
            scores = clean
        else:
            scores = class_scores(forward, units.remove(places < units.count(fraction)[:, None]), count)
        steps.append(measured(scores, target, measure))
    return torch.stack(steps, dim=1)


def perturbation_auc(
    forward: Forward,
    inputs: Inputs,
    attributions: Any,
    target: Target,
    *,
    order: Order = "positive",
    removal: RemovalChoice = "black",
    fractions: Sequence[float] | None = None,
    measure: OutputMeasure = "accuracy",
    seed: int = 0,
) -> Tensor:
    """The area under each example's perturbation curve, (N,), 100 times the trapezoid rule over the fractions.

    As published (CVPR 2021, table 1): the clean point counts and the width is not divided out, so that a model that is
    always right has 90 over the fractions 0 to 0.9. Lower is better for `order="positive"`, higher for `"negative"`.
    The arguments are those of `perturbation_curve`.
    """
    removal = removal_of(removal)
    fractions = removal.fractions if fractions is None else fractions
    curve = perturbation_curve(
        forward,
        inputs,
        attributions,
        target,
        order=order,
        removal=removal,
        fractions=fractions,
        measure=measure,
        seed=seed,
    )
    return curve_area(curve, fractions)


def curve_area(curve: Tensor, fractions: Sequence[float]) -> Tensor:
    """100 times the trapezoid area under (N, fractions) curves, (N,)."""
    check_tensor(curve, "curve")
    steps = checked_fractions(fractions)
    if curve.ndim != 2 or curve.shape[1] != len(steps):
        raise InputError(f"curve must be (N, {len(steps)}) for {len(steps)} fractions, got {tuple(curve.shape)}")
    return 100 * torch.trapezoid(curve.double(), torch.tensor(steps, dtype=torch.float64, device=curve.device))


def checked_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    """Refuses steps outside [0, 1] or out of order."""
    steps = numbers(fractions, "fractions")
    rising = steps.ndim == 1 and len(steps) > 1 and bool((steps[1:] >= steps[:-1]).all())
    if not rising or steps[0] < 0 or steps[-1] > 1:
        raise InputError(f"fractions must be at least two numbers of [0, 1] in rising order, got {fractions}")
    return tuple(steps.tolist())


def check_protocol(order: Any, measure: Any) -> None:
    """Refuses unknown options."""
    check_choice(order, "order", ("positive", "negative"))
    check_choice(measure, "measure", MEASURES)


def measured(scores: Tensor, target: Tensor, measure: OutputMeasure) -> Tensor:
    """(N,) what a measure says about (N, classes) scores."""
    values = {"probability": scores.softmax(-1), "sigmoid": scores.sigmoid()}.get(measure, scores)
    own = target_scores(values, target)
    if measure == "accuracy":
        return (scores.argmax(-1) == target).to(scores.dtype)
    if not own.isfinite().all():
        raise InputError(f"the target's score is -inf for example {int((~own.isfinite()).nonzero()[0])}: no {measure}")
    return own


class PerturbationAUC(Accumulator):
    """Perturbation curve and its area over a stream of batches.

    `compute` returns `auc`, an `Estimate`, and `curve`, one `Estimate` per fraction.

    Args:
        forward: as in `perturbation_curve`, like the other options.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        order: Order = "positive",
        removal: RemovalChoice = "black",
        fractions: Sequence[float] | None = None,
        measure: OutputMeasure = "accuracy",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.forward = forward
        check_protocol(order, measure)
        self.removal = removal_of(removal)
        self.fractions = checked_fractions(self.removal.fractions if fractions is None else fractions)
        self.options: dict[str, Any] = {"order": order, "measure": measure, "seed": seed}

    def protocol(self) -> dict[str, Any]:
        return {**self.options, "fractions": self.fractions, **self.removal.protocol()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"curve": (len(self.fractions),)}

    def update(self, inputs: Inputs, attributions: Any, target: Target, *, clean_scores: Tensor | None = None) -> None:
        """Adds a batch."""
        curve = perturbation_curve(
            self.forward,
            inputs,
            attributions,
            target,
            removal=self.removal,
            fractions=self.fractions,
            clean_scores=clean_scores,
            **self.options,
        )
        self._add(curve=curve)

    def _summary(self, estimate: Bootstrap) -> dict[str, Any]:
        curve = self._column("curve")
        area = curve_area(curve, self.fractions)
        estimates = estimate(torch.cat([area[:, None], curve], dim=1))
        return {"auc": estimates[0], "curve": estimates[1:]}
