"""Does the map point at the object? The pointing game and the share of relevance within the mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.metrics._inputs import maps_and_masks, numbers, whole_number
from captum_transformer_attr.metrics.accumulator import Accumulator, Bootstrap
from captum_transformer_attr.metrics.bootstrap import Estimate


class PointingResult(NamedTuple):
    """Per example, (N,) each.

    Attributes:
        hit: 1 where the maximum lies in the mask; with several equal maxima, the share of them that do.
        chance: the mask's share of the image, what a random point hits.
        center: what the middle of the image hits.
    """

    hit: Tensor
    chance: Tensor
    center: Tensor


def pointing_game(attributions: Tensor, masks: Tensor) -> PointingResult:
    """Pointing game (Zhang et al., ECCV 2016), without their tolerance of 15 pixels around the object.

    A map's maximum is often shared by several pixels (every pixel of a patch, a constant map). The expected hit of
    a point chosen among them is deterministic and favours no corner: a constant map scores exactly the chance level.

    Args:
        attributions: (N, H, W), (N, C, H, W) or a coarser grid, interpolated bilinearly to the masks.
        masks: (N, H, W), the object's pixels (see `box_masks` for boxes).

    Returns:
        hit, chance and image centre; NaN for an example whose mask is empty.

    Raises:
        InputError: shapes that do not fit, NaN attributions.
    """
    maps, masks = maps_and_masks(attributions, masks)
    chance = masks.double().mean((1, 2))
    undefined = chance == 0
    center = center_map(masks.shape[1:], device=maps.device).expand_as(maps)
    scores = (_hits(maps, masks), chance, _hits(center, masks))
    return PointingResult(*(score.masked_fill(undefined, float("nan")) for score in scores))


def mass_in_mask(attributions: Tensor, masks: Tensor) -> Tensor:
    """The share of the positive relevance that lies within the mask, (N,).

    The arguments are those of `pointing_game`. A map with nothing positive says nothing: it gets the mask's area, as
    a constant map does. NaN where the mask is empty.
    """
    maps, masks = maps_and_masks(attributions, masks)
    positive = maps.double().clamp(min=0)
    total = positive.sum((1, 2))
    area = masks.double().mean((1, 2))
    share = torch.where(total > 0, (positive * masks).sum((1, 2)) / total, area)
    return share.masked_fill(area == 0, float("nan"))


def center_map(size: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """The attribution that always points at the middle of the image, (H, W): minus the distance from it in pixels."""
    rows, columns = (torch.arange(n, device=device, dtype=torch.float64) - (n - 1) / 2 for n in _height_and_width(size))
    return -(rows[:, None].square() + columns.square()).sqrt()


def box_masks(boxes: Sequence[Sequence[float]] | Tensor, size: Sequence[int]) -> Tensor:
    """Boxes as masks.

    Args:
        boxes: (N, 4), x0, y0, x1, y1 in pixels, the first pixel included and the last one not (a box over the whole
            image of width W and height H is 0, 0, W, H).
        size: height and width.

    Returns:
        (N, H, W) booleans: pixels whose centre lies in the box.
    """
    corners = numbers(boxes, "boxes")
    if corners.ndim != 2 or corners.shape[1] != 4:
        raise InputError(f"boxes must be (N, 4), got {tuple(corners.shape)}")
    if not (corners[:, 2:] >= corners[:, :2]).all():
        raise InputError("boxes must be x0, y0, x1, y1 with x0 <= x1 and y0 <= y1")
    height, width = _height_and_width(size)
    x0, y0, x1, y1 = corners[:, :, None].unbind(1)
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    return ((rows > y0) & (rows < y1))[:, :, None] & ((columns > x0) & (columns < x1))[:, None, :]


def _height_and_width(size: Any) -> tuple[int, ...]:
    if not isinstance(size, Sequence) or len(size) != 2:
        raise InputError(f"size must be height and width, got {size!r}")
    return tuple(whole_number(length, "size", 1) for length in size)


def _hits(maps: Tensor, masks: Tensor) -> Tensor:
    best = maps == maps.amax((1, 2), keepdim=True)
    return (best & masks).sum((1, 2)).double() / best.sum((1, 2))


class PointingGame(Accumulator):
    """Pointing game and mass in the mask over a stream of batches, with what chance and the image centre reach.

    `compute` returns `hit`, `chance`, `center`, `mass`, and the same with `_off_center`: these rest on the examples
    whose object does not cover the image centre at all, where a map that always points at the middle is of no use.
    """

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"hit": (), "chance": (), "center": (), "mass": ()}

    def update(self, attributions: Tensor, masks: Tensor) -> None:
        """Adds a batch."""
        result = pointing_game(attributions, masks)
        self._add(**result._asdict(), mass=mass_in_mask(attributions, masks))

    def _summary(self, estimate: Bootstrap) -> dict[str, Any]:
        away = ~(self._column("center") > 0)  # undefined examples stay in, to be counted as skipped
        estimates: dict[str, Estimate] = {}
        for name in ("hit", "chance", "center", "mass"):
            column = self._column(name)
            estimates[name] = estimate(column)[0]
            estimates[f"{name}_off_center"] = estimate(column[away])[0]
        return estimates
