"""What a scene shows besides its digits: a coloured gradient, thin strokes, speckles and pieces of other digits."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_transformer_attr.digit_scenes.drawing import paste, rotated_tiles, segments

_STROKES = 5
_FRAGMENTS = 6
_FRAGMENT_SIZES = (8.0, 10.5)  # edge of a quarter of a digit in pixels, the quarter of a 16 to 21 pixel field
_FRAGMENT_TILE = 16
_SPECKLE_SHARE = 0.012


def random_colours(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Bright RGB colours ``(*shape, 3)`` in [0.29, 1] of random hue; they say nothing about the class."""
    hue = rng.random(shape) * 6
    saturation = rng.uniform(0.15, 0.65, shape)
    value = rng.uniform(0.85, 1.0, shape)
    offsets = np.array([5.0, 3.0, 1.0])
    k = (offsets + hue[..., None]) % 6
    ramp = np.clip(np.minimum(k, 4 - k), 0, 1)
    return _tensor(value[..., None] * (1 - saturation[..., None] * ramp))


def draw_background(rng: np.random.Generator, count: int, canvas_size: int) -> Tensor:
    """Dark gradients with thin strokes and speckles, ``(N, 3, S, S)`` float32 in [0, 1]."""
    coarse = _tensor(rng.uniform(0.0, 0.32, (count, 3, 3, 3)))
    canvas = F.interpolate(coarse, size=(canvas_size, canvas_size), mode="bilinear", align_corners=True)
    _draw_strokes(rng, canvas)
    speckles = torch.from_numpy(rng.random((count, 1, canvas_size, canvas_size)) < _SPECKLE_SHARE)
    brightness = _tensor(rng.uniform(0.3, 1.0, (count, 3, 1, 1)))
    canvas = torch.where(speckles, brightness, canvas)
    grain = _tensor(rng.standard_normal(canvas.shape, dtype=np.float32)) * 0.03
    return (canvas + grain).clamp(0, 1)


def _draw_strokes(rng: np.random.Generator, canvas: Tensor) -> None:
    count, _, size, _ = canvas.shape
    for _ in range(_STROKES):
        starts = rng.uniform(0, size, (count, 2))
        angle = rng.uniform(0, 2 * np.pi, count)
        length = rng.uniform(0.15, 0.7, count) * size
        ends = starts + length[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        # Thinner than any pen stroke of an upscaled digit, so that a straight one is not a "1".
        widths = rng.uniform(0.4, 1.1, count)
        opacity = segments(_tensor(starts), _tensor(ends), _tensor(widths), size)
        opacity *= _tensor(rng.uniform(0.25, 0.7, (count, 1, 1)))
        canvas.lerp_(random_colours(rng, (count,))[..., None, None], opacity[:, None])


def draw_fragments(
    rng: np.random.Generator,
    canvas: Tensor,
    digits: Tensor,
    centres: np.ndarray,
    sizes: np.ndarray,
    present: np.ndarray,
) -> Tensor:
    """Draw quarter pieces of random handwritten digits in the space that the scene's digits leave.

    The pieces have the ink, the colours and the stroke width of the digits: only the whole shape tells a digit from
    clutter.

    Args:
        rng: source of randomness.
        canvas: ``(N, 3, S, S)``.
        digits: ``(D, 8, 8)`` handwriting to cut from.
        centres: ``(N, K, 2)`` (x, y) in pixels of the places to keep free.
        sizes: ``(N, K)`` edges of those places in pixels.
        present: ``(N, K)`` bool, False for places that need not be kept free.

    Returns:
        A new tensor ``(N, 3, S, S)``.
    """
    count, size = len(canvas), canvas.shape[-1]
    whole = digits[torch.from_numpy(rng.integers(len(digits), size=count * _FRAGMENTS))]
    quarters = whole.unfold(1, 4, 4).unfold(2, 4, 4).flatten(1, 2)
    pieces = quarters[torch.arange(len(whole)), torch.from_numpy(rng.integers(4, size=len(whole)))]
    piece_sizes = rng.uniform(*_FRAGMENT_SIZES, size=(count, _FRAGMENTS))
    degrees = rng.uniform(0, 360, size=len(whole))
    tiles = rotated_tiles(pieces, _tensor(piece_sizes).flatten(), _tensor(degrees), _FRAGMENT_TILE)
    tiles = tiles.view(count, _FRAGMENTS, _FRAGMENT_TILE, _FRAGMENT_TILE)

    places = rng.integers(0, size, size=(count, _FRAGMENTS, 2))
    distance = np.abs(places[:, :, None] - centres[:, None]).max(axis=-1)
    # A rotated piece reaches 1 / sqrt 2 of its edge from its centre, and touching ink could turn a 3 into an 8.
    needed = sizes[:, None] / 2 + piece_sizes[:, :, None] * 0.71 + 1
    free = ((distance >= needed) | ~present[:, None]).all(axis=-1)

    opacity = paste(tiles * _tensor(free)[..., None, None], torch.from_numpy(places), size)
    colours = random_colours(rng, (count, _FRAGMENTS))[..., None, None]
    canvas = canvas.clone()
    for piece in range(_FRAGMENTS):
        canvas.lerp_(colours[:, piece], opacity[:, piece, None])
    return canvas


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).float()
