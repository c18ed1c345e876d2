"""Digit scenes: several handwritten digits on one cluttered canvas, with the exact pixels of every digit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from captum_transformer_attr.digit_scenes.clutter import draw_background, draw_fragments, random_colours
from captum_transformer_attr.digit_scenes.digits import Split, load_digit_images
from captum_transformer_attr.digit_scenes.drawing import paste, rotated_tiles

CANVAS_SIZE = 64
CLASS_NAMES = tuple(str(digit) for digit in range(10))

_DIGIT_SIZES = (16.0, 21.0)  # edge of the upscaled 8x8 field in pixels
_TILE = 26  # holds the largest field, rotated
_MAX_ROTATION = 12.0  # degrees
_FAINTEST_INK = 0.2  # opacity below which a pixel of the smooth upscaling counts as no ink
_GAP = 1.0  # pixels left free between the fields of two digits
_LAYOUTS_PER_ROUND = 16


@dataclass(frozen=True)
class DigitScenes:
    """A set of N scenes of height and width S with pixel-exact ground truth.

    Attributes:
        images: ``(N, 3, S, S)`` float32, RGB in [0, 1].
        labels: ``(N, 10)`` float32, 1 where the digit is in the scene. A class occurs at most once per scene.
        masks: ``(N, 10, S, S)`` bool, the pixels drawn with ink of each digit; digits never overlap.
        boxes: ``(N, 10, 4)`` int64, tightest box ``(left, top, right, bottom)`` of each mask in pixels, right and
            bottom exclusive; -1 for absent digits.
        backgrounds: ``(N, 3, S, S)`` float32, the canvas with its clutter before any digit was drawn. Images and
            backgrounds differ exactly inside the masks, so a digit can be taken out of a scene without a trace.
        digit_ids: ``(N, 10)`` int64, index of the handwritten digit in :func:`load_digit_images` of the scenes' split;
            -1 for absent digits.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor
    boxes: Tensor
    backgrounds: Tensor
    digit_ids: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def without(self, digit: int) -> Tensor:
        """Images ``(N, 3, S, S)`` with the background put back where ``digit`` (0..9) was."""
        return torch.where(self.masks[:, digit, None], self.backgrounds, self.images)


def make_scenes(
    count: int,
    split: Split = "test",
    seed: int = 0,
    *,
    canvas_size: int = CANVAS_SIZE,
    digits_per_scene: tuple[int, int] = (2, 4),
) -> DigitScenes:
    """Draw random digit scenes; the same arguments give the same scenes.

    Each scene has distinct digits of random writers, sizes (16 to 21 pixels), rotations (up to 12 degrees) and colours
    at random places that do not overlap, over a coloured gradient with strokes, speckles and quarters of other digits.

    Args:
        count: number of scenes N, at least 1.
        split: whose handwriting, ``"train"`` or ``"test"``; no digit and no writer is in both.
        seed: seed of every random choice, at least 0.
        canvas_size: height and width S in pixels, at least 24.
        digits_per_scene: smallest and largest number of digits in a scene, all numbers between equally likely; at
            most 4, and fewer on a canvas under 64 pixels.

    Raises:
        ValueError: an argument out of its range, or more digits than the canvas has room for.
        ImportError: scikit-learn is not installed (``pip install 'captum-transformer-attr[cli]'``).
    """
    _check(count, canvas_size, digits_per_scene)
    fewest, most = digits_per_scene
    images, classes = load_digit_images(split)
    rng = np.random.default_rng(seed)

    backgrounds = draw_background(rng, count, canvas_size)
    slots = max(most, 1)
    present = np.arange(slots) < rng.integers(fewest, most + 1, size=count)[:, None]
    chosen_classes = rng.permuted(np.tile(np.arange(10), (count, 1)), axis=1)[:, :slots]
    chosen_ids = _random_member(rng, classes.numpy(), chosen_classes)
    sizes = rng.uniform(*_DIGIT_SIZES, size=(count, slots))
    centres = _place(rng, sizes, present, canvas_size)

    backgrounds = draw_fragments(rng, backgrounds, images, centres, sizes, present)

    digits = images[torch.from_numpy(chosen_ids)].flatten(0, 1)
    opacity = _opacities(rng, digits, sizes, centres, present, canvas_size)
    colours = random_colours(rng, (count, slots))

    weight = opacity.sum(1, keepdim=True)
    painted = torch.einsum("nkhw,nkc->nchw", opacity, colours)
    scene_images = backgrounds * (1 - weight) + painted

    masks = torch.zeros(count, 10, canvas_size, canvas_size, dtype=torch.bool)
    rows, slot_index = np.nonzero(present)
    masks[rows, chosen_classes[rows, slot_index]] = opacity[rows, slot_index] > 0
    digit_ids = torch.full((count, 10), -1)
    digit_ids[rows, chosen_classes[rows, slot_index]] = torch.from_numpy(chosen_ids[rows, slot_index])
    labels = (digit_ids >= 0).float()
    return DigitScenes(scene_images, labels, masks, _boxes(masks), backgrounds, digit_ids)


def _check(count: int, canvas_size: int, digits_per_scene: tuple[int, int]) -> None:
    """Refuses arguments of `make_scenes` out of their range."""
    fewest, most = digits_per_scene
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if canvas_size < 24:
        raise ValueError(f"canvas_size must be at least 24 pixels, got {canvas_size}")
    # Whole random layouts are drawn until one fits: quick up to four digits that cover less than half of the canvas.
    room = min(4, max(1, int(0.5 * (canvas_size / (_DIGIT_SIZES[1] + _GAP)) ** 2)))
    if not 0 <= fewest <= most <= room:
        raise ValueError(
            f"digits_per_scene must be (fewest, most) within 0..{room} on a {canvas_size}-pixel canvas, "
            f"got {digits_per_scene}"
        )


def _opacities(
    rng: np.random.Generator,
    digits: Tensor,
    sizes: np.ndarray,
    centres: np.ndarray,
    present: np.ndarray,
    canvas_size: int,
) -> Tensor:
    """Ink of randomly rotated digits ``(N * K, h, w)`` at their centres on the canvas, ``(N, K, S, S)`` in [0, 1]."""
    ink = rotated_tiles(
        digits,
        torch.from_numpy(sizes).flatten(),
        torch.from_numpy(rng.uniform(-_MAX_ROTATION, _MAX_ROTATION, size=sizes.size)),
        _TILE,
    )
    ink = torch.where(ink < _FAINTEST_INK, 0, ink).view(*sizes.shape, _TILE, _TILE)
    ink = ink * torch.from_numpy(present).float()[:, :, None, None]
    opacity = paste(ink, torch.from_numpy(centres), canvas_size)
    # The corners of two rotated fields may touch: the pixel goes to the digit drawn first.
    return torch.where(opacity.cumsum(1) > opacity, 0, opacity)


def _random_member(rng: np.random.Generator, classes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index of a random digit of each wanted class; same shape as ``wanted``."""
    members = np.argsort(classes, kind="stable")
    sizes = np.bincount(classes, minlength=10)
    starts = np.cumsum(sizes) - sizes
    return members[starts[wanted] + (rng.random(wanted.shape) * sizes[wanted]).astype(np.int64)]


def _place(rng: np.random.Generator, sizes: np.ndarray, present: np.ndarray, canvas_size: int) -> np.ndarray:
    """Whole-pixel centres ``(N, K, 2)`` (x, y) at which no two present digits' fields ``sizes`` ``(N, K)`` overlap.

    Rejection sampling: whole layouts are drawn until one fits, so that all layouts that fit are equally likely.
    """
    count, slots = sizes.shape
    centres = np.zeros((count, slots, 2), dtype=np.int64)
    pending = np.arange(count)
    margin = np.ceil(sizes / 2) + 1
    first, second = np.triu_indices(slots, k=1)
    while len(pending):
        edge = margin[pending][:, None, :, None]
        layouts = rng.random((len(pending), _LAYOUTS_PER_ROUND, slots, 2)) * (canvas_size - 2 * edge) + edge
        layouts = np.rint(layouts).astype(np.int64)
        distance = np.abs(layouts[:, :, first] - layouts[:, :, second]).max(axis=-1)
        needed = (sizes[pending][:, first] + sizes[pending][:, second]) / 2 + _GAP
        matters = present[pending][:, first] & present[pending][:, second]
        fits = ((distance >= needed[:, None]) | ~matters[:, None]).all(axis=-1)
        placed = fits.any(axis=1)
        centres[pending[placed]] = layouts[placed, fits[placed].argmax(axis=1)]
        pending = pending[~placed]
    return centres


def _boxes(masks: Tensor) -> Tensor:
    """Tightest (left, top, right, bottom) of each mask, exclusive at the far end; -1 for empty masks."""
    sides = []
    for along in (masks.any(dim=-2), masks.any(dim=-1)):  # columns, rows
        length = along.shape[-1]
        sides.append((along.int().argmax(-1), length - along.flip(-1).int().argmax(-1)))
    (left, right), (top, bottom) = sides
    boxes = torch.stack([left, top, right, bottom], dim=-1)
    return torch.where(masks.flatten(-2).any(-1)[..., None], boxes, -1)
