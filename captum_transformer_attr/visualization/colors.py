"""From scores to colours: one scale per map, sequential for positive maps, diverging for signed ones.

A map is drawn as *signed* when it has negative scores beyond rounding. Then red speaks for the class, blue against it,
and the scale is symmetric around zero. Otherwise the scale runs from the map's smallest to its largest score, because
several methods (attention rollout above all) add a constant to every token that says nothing about the input.
Texts start at zero instead: of two words, the weaker one would always look like nothing at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import matplotlib
import numpy as np
import numpy.typing as npt

from captum_transformer_attr.visualization.report import FloatArray

SEQUENTIAL = "turbo"
DIVERGING = "RdBu_r"
CLIP_PERCENTILE = 99.5
"""Larger magnitudes than this percentile are drawn as if they were at it: input-level maps have few huge pixels."""
ROUNDING = 1e-6


@dataclass(frozen=True)
class ColorScale:
    """The scores that the two ends of a colour map stand for."""

    low: float
    high: float
    signed: bool

    @property
    def colormap(self) -> str:
        return DIVERGING if self.signed else SEQUENTIAL

    @property
    def flat(self) -> bool:
        """Whether all scores are (nearly) equal, so that there is nothing to see."""
        return not self.high - self.low > ROUNDING * max(abs(self.high), abs(self.low))

    def position(self, scores: FloatArray) -> FloatArray:
        """Where each score lies on the scale: 0 at ``low``, 1 at ``high``, clipped. Flat maps lie at their zero."""
        if self.flat:
            return np.full(scores.shape, 0.5 if self.signed else 0.0)
        return np.clip((np.asarray(scores, dtype=np.float64) - self.low) / (self.high - self.low), 0.0, 1.0)


def scale_of(scores: FloatArray) -> ColorScale:
    """The colour scale of one map."""
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        return ColorScale(0.0, 0.0, signed=False)
    largest, signed = _magnitude(values)
    # Small maps have no outliers to protect against: a percentile would only cut off their best place.
    many = values.size >= 400
    if signed:
        limit = float(np.percentile(np.abs(values), CLIP_PERCENTILE)) if many else largest
        return ColorScale(-limit, limit, signed=True)
    high = float(np.percentile(values, CLIP_PERCENTILE)) if many else float(values.max())
    return ColorScale(float(values.min()), max(high, float(values.min())), signed=False)


def text_scale(scores: FloatArray) -> ColorScale:
    """The colour scale of one sequence of scores: from 0, or symmetric around it, to the largest magnitude."""
    largest, signed = _magnitude(np.asarray(scores, dtype=np.float64))
    return ColorScale(-largest if signed else 0.0, largest, signed)


def _magnitude(values: FloatArray) -> tuple[float, bool]:
    """The largest magnitude, and whether there are negative scores beyond rounding."""
    largest = float(np.abs(values).max(initial=0.0))
    return largest, bool((values < -ROUNDING * largest).any())


@cache
def palette(signed: bool) -> npt.NDArray[np.uint8]:
    """256 RGBA colours of a scale, ``(256, 4)`` uint8.

    Opacity grows with the magnitude of the score, so that the picture stays visible where a method says nothing.
    """
    colors = matplotlib.colormaps[DIVERGING if signed else SEQUENTIAL](np.linspace(0.0, 1.0, 256))
    position = np.linspace(-1.0, 1.0, 256) if signed else np.linspace(0.0, 1.0, 256)
    # The middle of the diverging scale is white and would lie over the picture like fog.
    least = 0.05 if signed else 0.25
    colors[:, 3] = least + (1.0 - least) * np.abs(position) ** 0.6
    table = np.round(255 * colors).astype(np.uint8)
    table.setflags(write=False)
    return table


def text_color(score: float, scale: ColorScale) -> tuple[int, int, int, float]:
    """Background of a token: red for, blue against, opacity proportional to the magnitude.

    Args:
        score: The token's score.
        scale: The sequence's scale.

    Returns:
        ``(r, g, b, alpha)`` with colours in 0..255 and alpha in 0..1.
    """
    position = float(scale.position(np.asarray([score]))[0])
    if scale.signed:
        strength = 2.0 * position - 1.0
        return (214, 39, 40, strength) if strength >= 0 else (31, 99, 200, -strength)
    return (214, 39, 40, position)
