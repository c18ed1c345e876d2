"""Do the maps of different classes differ, and each point at its own object?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.metrics._inputs import boolean_masks, check_tensor, spatial_maps


class DiscriminativenessResult(NamedTuple):
    """Per example, (N,) each.

    Attributes:
        separation: 1 minus the mean correlation between the maps of two classes; 0 for a class-blind method, up to 2
            for maps that exclude each other.
        localization: how much of the positive relevance on any of the objects lies on the right one, mean over the
            classes; exactly 1 / K for a class-blind method and disjoint objects. None without masks.
    """

    separation: Tensor
    localization: Tensor | None


def class_discriminativeness(attributions: Tensor, masks: Tensor | None = None) -> DiscriminativenessResult:
    """Compares explanations of the same image for K classes.

    The question of Chefer et al. (CVPR 2021, figure 1; ICCV 2021): rollout and raw attention show the same picture for
    every class. The localization is the share with which a map prefers its own object among all objects named.

    Args:
        attributions: (N, K, H, W), a map per class, channels already summed; K at least 2.
        masks: (N, K, H, W), the pixels of each class's object.

    Returns:
        Separation and localization. Two constant maps count as equal, a constant and another one as uncorrelated.
        A map without positive relevance on any object prefers none: 1 / K. NaN where an object has no pixels.

    Raises:
        InputError: fewer than two classes, shapes that do not fit, NaN attributions.
    """
    check_tensor(attributions, "attributions")
    if attributions.ndim != 4 or attributions.shape[1] < 2:
        raise InputError(
            f"attributions must be (N, K, H, W) with at least two classes K, got {tuple(attributions.shape)}"
        )
    count, classes = attributions.shape[:2]
    flat = attributions.flatten(0, 1)
    if masks is not None:
        check_tensor(masks, "masks")
        if masks.ndim != 4 or masks.shape[:2] != attributions.shape[:2]:
            raise InputError(f"masks must be (N, K, H, W) with N, K = {count}, {classes}, got {tuple(masks.shape)}")
    size = flat.shape[1:] if masks is None else masks.shape[-2:]
    maps = spatial_maps(flat, size).double().unflatten(0, (count, classes))
    separation = 1 - _mean_correlation(maps.flatten(2))
    if masks is None:
        return DiscriminativenessResult(separation, None)
    objects = boolean_masks(masks.flatten(0, 1), count * classes).to(maps.device).view(count, classes, -1)
    # [n, k, j]: positive relevance of the map for class k on the object of class j
    mass = maps.clamp(min=0).flatten(2) @ objects.double().mT
    total = mass.sum(-1)
    own = mass.diagonal(dim1=1, dim2=2)
    localization = torch.where(total > 0, own / total, 1 / classes).mean(1)
    return DiscriminativenessResult(separation, localization.masked_fill(~objects.any(-1).all(-1), float("nan")))


def _mean_correlation(maps: Tensor) -> Tensor:
    """Mean Pearson correlation over the pairs of (N, K, pixels)."""
    centered = maps - maps.mean(-1, keepdim=True)
    constant = maps.amax(-1) == maps.amin(-1)
    unit = centered / centered.norm(dim=-1, keepdim=True)
    unit = unit.masked_fill(constant[..., None], 0)
    correlation = unit @ unit.mT + (constant[:, :, None] & constant[:, None, :]).double()
    first, second = torch.triu_indices(maps.shape[1], maps.shape[1], offset=1, device=maps.device)
    return correlation[:, first, second].mean(-1)
