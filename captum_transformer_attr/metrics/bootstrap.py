"""Percentile bootstrap over examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import numpy as np
from torch import Tensor

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.metrics._inputs import whole_number


@dataclass(frozen=True)
class Estimate:
    """A score over a data set with its confidence interval.

    Attributes:
        value: the score of the data set itself.
        low, high: ends of the interval; NaN with fewer than two examples.
        count: examples it rests on.
        skipped: examples for which the score is not defined (no object, no rationale), left out of all the above.
    """

    value: float
    low: float
    high: float
    count: int
    skipped: int = 0

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def mean(rows: np.ndarray) -> np.ndarray:
    """The mean over examples (the first dimension)."""
    return rows.mean(axis=0)


def bootstrap(
    values: Tensor | np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] = mean,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Estimate]:
    """Percentile bootstrap interval of a statistic over examples (Efron and Tibshirani 1993, chapter 13).

    Examples are drawn with replacement and their whole rows stay together, so that ratios of sums (IoU) and curves are
    resampled correctly. For the difference of two methods, give the differences on the same examples.

    Args:
        values: (N,) or (N, columns), a row per example. Rows with a NaN are undefined and left out.
        statistic: maps (N, columns) to an array of results; the mean over examples by default.
        confidence: share of the bootstrap distribution within the interval.

    Returns:
        One estimate per result of the statistic.

    Raises:
        InputError: values that are no rows of numbers, no resamples, a negative seed, or a confidence outside (0, 1).
    """
    if not isinstance(confidence, Real) or not 0 < confidence < 1:
        raise InputError(f"confidence must lie in (0, 1), got {confidence!r}")
    resamples, seed = whole_number(resamples, "resamples", 1), whole_number(seed, "seed", 0)
    try:
        rows = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise InputError(f"values must hold one number or row of numbers per example: {error}") from error
    if not rows.ndim:
        raise InputError(f"values must hold one number or row of numbers per example, got {values!r}")
    rows = rows.reshape(len(rows), math.prod(rows.shape[1:]))  # -1 fails without rows
    defined = ~np.isnan(rows).any(axis=1)
    skipped, rows = int((~defined).sum()), rows[defined]
    count = len(rows)
    if count == 0:
        return [Estimate(float("nan"), float("nan"), float("nan"), 0, skipped) for _ in range(rows.shape[1])]
    point = np.atleast_1d(statistic(rows))
    low = high = np.full_like(point, np.nan, dtype=float)
    if count > 1:
        generator = np.random.default_rng(seed)
        drawn = [np.atleast_1d(statistic(rows[generator.integers(0, count, count)])) for _ in range(resamples)]
        low, high = np.quantile(np.stack(drawn), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    ends = zip(point.tolist(), low.tolist(), high.tolist(), strict=True)
    return [Estimate(value, lower, upper, count, skipped) for value, lower, upper in ends]
