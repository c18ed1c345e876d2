"""From attributions of channels and features to scores of pixels and tokens."""

from __future__ import annotations

import warnings

from torch import Tensor

from captum_transformer_attr.errors import InputError


def element_scores(attributions: Tensor) -> Tensor:
    """One score per pixel or token from attributions of any input.

    Token-level and perturbation methods give every channel of a pixel the same score, which is then the pixel's;
    attributions that differ between channels are summed.

    Args:
        attributions: ``(N, C, H, W)``, ``(N, T, E)`` or ``(N, T)``.

    Returns:
        ``(N, H, W)`` or ``(N, T)``.
    """
    values = attributions.detach().double()
    if values.ndim == 2:
        return values
    if values.ndim not in (3, 4):
        raise InputError(f"attributions of shape {tuple(values.shape)} belong to no image and no sequence")
    axis = 1 if values.ndim == 4 else 2
    return over_features(values, axis)


def over_features(values: Tensor, axis: int) -> Tensor:
    """The common score where all features of an element have the same one, else their sum."""
    first = values.select(axis, 0)
    return first if bool((values == first.unsqueeze(axis)).all()) else values.sum(axis)


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation over all scores of two methods; NaN where one of them is constant."""
    from scipy.stats import ConstantInputWarning, spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(spearmanr(first.flatten().cpu(), second.flatten().cpu()).statistic)
