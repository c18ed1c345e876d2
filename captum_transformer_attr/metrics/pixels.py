"""Removing pixels: black, the image's mean colour, or a blurred copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.metrics._inputs import Inputs, check_choice, numbers, spatial_maps, whole_number
from captum_transformer_attr.metrics.removal import RemovableUnits, Removal

PIXEL_FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Steps of Chefer et al., CVPR 2021: the clean image, then 10 % to 90 % of the pixels."""


class PixelRemoval(Removal):
    """Replaces pixels, all channels together.

    Args:
        baseline: `"black"` (Chefer et al., CVPR 2021), `"mean"` (the image's own mean colour; Wu et al., CVPR 2024),
            `"blur"` (a Gaussian blur, Petsiuk et al., BMVC 2018; needs torchvision), or a tensor that can be expanded
            to the images, in their normalisation.
        mean, std: the normalisation the images went through, a number per channel. Only `"black"` needs it: black
            is 0 before normalising, that is -mean / std.
        blur: kernel size (odd) and standard deviation in pixels.
        square: edge in pixels of the squares that are removed as a whole, by the mean of their scores; 1 is the
            published protocol. Single pixels of a fine-grained map are scattered noise that throws a model off the data
            it knows, whatever they show; squares of the patch size compare pixel and token methods on equal terms.
        images: where the images are if `inputs` is a mapping.

    Coarser attributions are interpolated bilinearly to the image, channels are summed.
    """

    fractions = PIXEL_FRACTIONS

    def __init__(
        self,
        baseline: Literal["black", "mean", "blur"] | Tensor = "black",
        *,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        blur: tuple[int, float] = (11, 5.0),
        square: int = 1,
        images: str = "pixel_values",
    ) -> None:
        if not isinstance(baseline, Tensor):
            check_choice(baseline, "baseline (if not a tensor)", ("black", "mean", "blur"))
        self.baseline = baseline
        self.mean = numbers(mean, "mean").reshape(-1, 1, 1)
        self.std = numbers(std, "std").reshape(-1, 1, 1)
        if not (self.std > 0).all():
            raise InputError(f"std must be positive, got {std}")
        self.blur = _kernel(blur)
        self.square = whole_number(square, "square", 1)
        self.images = images

    def prepare(self, inputs: Inputs, attributions: object) -> RemovablePixels:
        images = _images_of(inputs, self.images)
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise InputError(f"images must be a tensor (N, C, H, W), as inputs or as its entry {self.images!r}")
        attributions = _images_of(attributions, self.images)
        if not isinstance(attributions, Tensor) or len(attributions) != len(images):
            raise InputError(f"attributions must be a tensor for the {len(images)} images")
        height, width = images.shape[2:]
        if height % self.square or width % self.square:
            raise InputError(f"square={self.square} does not divide images of {height}x{width} pixels")
        maps = spatial_maps(attributions.to(images.device), (height, width))
        return RemovablePixels(maps, self.square, images, self.replacement(images), inputs, self.images)

    def replacement(self, images: Tensor) -> Tensor:
        """What removed pixels are replaced by; can be expanded to the images (N, C, H, W)."""
        if isinstance(self.baseline, Tensor):
            _check_fits(self.baseline, images, "baseline")
            return self.baseline.to(images)
        if self.baseline == "black":
            _check_fits(self.mean, images, "mean")
            _check_fits(self.std, images, "std")
            return (-self.mean / self.std).to(images)
        if self.baseline == "mean":
            if not images.is_floating_point():
                raise InputError(f'images must be floating for the baseline "mean", got {images.dtype}')
            return images.mean(dim=(2, 3), keepdim=True)
        from torchvision.transforms.functional import gaussian_blur

        size, deviation = self.blur
        if size // 2 >= min(images.shape[2:]):
            raise InputError(f"a blur kernel of {size} pixels is too large for images of {tuple(images.shape[2:])}")
        return gaussian_blur(images, [size, size], [deviation, deviation])


def removal_of(removal: Any) -> Removal:
    """A way of removing; the name of a pixel baseline stands for images in [0, 1]."""
    if isinstance(removal, str):
        return PixelRemoval(removal)  # type: ignore[arg-type]
    if not isinstance(removal, Removal):
        raise InputError(f'removal must be "black", "mean", "blur" or a Removal, got {removal!r}')
    return removal


def _images_of(given: Any, entry: str) -> Any:
    """What belongs to the images, of inputs or attributions in any container."""
    if isinstance(given, Mapping):
        given = given.get(entry)
    if isinstance(given, tuple):
        return given[0] if given else None
    return given


def _kernel(blur: Any) -> tuple[int, float]:
    """Size and standard deviation of a Gaussian kernel."""
    if not isinstance(blur, Sequence) or len(blur) != 2:
        raise InputError(f"blur must be a kernel size and a standard deviation, got {blur!r}")
    size, deviation = whole_number(blur[0], "blur's kernel size", 1), numbers(blur[1], "blur's standard deviation")
    if size % 2 == 0 or deviation.ndim or deviation <= 0:
        raise InputError(f"blur must be an odd kernel size and a positive standard deviation, got {blur!r}")
    return size, deviation.item()


def _check_fits(values: Tensor, images: Tensor, name: str) -> None:
    """Refuses values that cannot be expanded to the images: broadcasting would enlarge the images instead."""
    try:
        values.expand(images.shape)
    except RuntimeError as error:
        raise InputError(
            f"{name} of shape {tuple(values.shape)} cannot be expanded to images of shape {tuple(images.shape)}"
        ) from error


class RemovablePixels(RemovableUnits):
    """Images with one unit per pixel or square, in reading order."""

    def __init__(
        self, maps: Tensor, square: int, images: Tensor, replacement: Tensor, inputs: Inputs, entry: str
    ) -> None:
        grid = maps if square == 1 else functional.avg_pool2d(maps[:, None], square)[:, 0]
        super().__init__(grid.flatten(1), torch.ones_like(grid.flatten(1), dtype=torch.bool))
        self.grid = tuple(grid.shape[1:])
        self.square = square
        self.images = images
        self.baseline = replacement
        self.inputs = inputs
        self.entry = entry

    def count(self, fraction: float) -> Tensor:
        # The published code rounds down; the tiny addition keeps 0.7 * 10 from becoming 6.
        number = int(fraction * self.scores.shape[1] + 1e-9)
        return torch.full((len(self.scores),), number, device=self.scores.device)

    def remove(self, removed: Tensor) -> Inputs:
        where = removed.view(-1, 1, *self.grid)
        if self.square > 1:
            where = where.repeat_interleave(self.square, 2).repeat_interleave(self.square, 3)
        changed = torch.where(where, self.baseline, self.images)
        if isinstance(self.inputs, Mapping):
            return {**self.inputs, self.entry: changed}
        return (changed, *self.inputs[1:]) if isinstance(self.inputs, tuple) else changed
