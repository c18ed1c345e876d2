"""Reading pictures and turning them into model input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from captum_transformer_attr.loading.errors import LoadingError, first_line

LARGEST_SIDE = 4096
"""Pixels; the attention maps of larger inputs fit into no memory."""


def read_image(path: str | Path) -> Image.Image:
    """Read a picture as RGB, turned the way its camera meant it.

    Raises:
        LoadingError: if the file is missing, no picture, or damaged.
    """
    try:
        with Image.open(path) as opened:
            if opened.mode == "F" and not np.isfinite(np.asarray(opened)).all():
                raise LoadingError(f"image {path} holds NaN or infinite values")
            return ImageOps.exif_transpose(opened).convert("RGB")
    except LoadingError:
        raise
    except FileNotFoundError:
        raise LoadingError(f"image {str(path)!r} does not exist") from None
    except UnidentifiedImageError:
        raise LoadingError(f"{path} is not an image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise LoadingError(f"image {path} cannot be read: {first_line(error)}") from error


@dataclass(frozen=True)
class PreprocessingOptions:
    """What the user wants otherwise than the model's own configuration says; None keeps the model's.

    Attributes:
        size: ``(height, width)`` of the model input in pixels.
        mean: Per channel, subtracted from pixels in [0, 1].
        std: Per channel, divided by.
        squash: Resize the whole picture to the input size, instead of cropping its centre.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    squash: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and min(self.size) < 1:
            raise LoadingError(f"size must be positive, got {self.size[0]}x{self.size[1]}")
        if self.size is not None and max(self.size) > LARGEST_SIDE:
            raise LoadingError(f"size {self.size[0]}x{self.size[1]} is more than {LARGEST_SIDE} pixels a side")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and not np.isfinite(values).all():
                raise LoadingError(f"{name} must be finite, got {values}")
        if self.std is not None and min(self.std) <= 0:
            raise LoadingError(f"std must be positive, got {self.std}")


@dataclass(frozen=True)
class ImagePreprocessing:
    """From a picture to one example of model input, and back to what the model was shown.

    Attributes:
        transform: Picture -> ``(3, H, W)`` float32, normalised.
        mean: What the transform subtracts per channel from pixels in [0, 1].
        std: What it divides by.
    """

    transform: Callable[[Image.Image], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> Tensor:
        return self.transform(image)

    def picture(self, pixels: Tensor) -> npt.NDArray[np.uint8]:
        """What the model was shown, ``(H, W, 3)`` uint8: the model input without its normalisation."""
        mean, std = (pixels.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        shown = (pixels * std + mean).clamp(0, 1) * 255
        return shown.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def plain_preprocessing(
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    squash: bool = False,
    crop_fraction: float = 1.0,
) -> ImagePreprocessing:
    """Resize, crop the centre (unless ``squash``), scale to [0, 1], normalise.

    Args:
        size: ``(height, width)`` of the model input.
        mean: Per channel.
        std: Per channel.
        squash: Resize to exactly ``size``, whatever the picture's proportions.
        crop_fraction: Share of the resized picture's shorter side that the crop keeps.
    """
    from torchvision.transforms import v2

    bicubic = v2.InterpolationMode.BICUBIC
    if squash:
        resize: list[torch.nn.Module] = [v2.Resize(list(size), interpolation=bicubic, antialias=True)]
    else:
        shorter = round(max(size) / crop_fraction)
        resize = [v2.Resize(shorter, interpolation=bicubic, antialias=True), v2.CenterCrop(list(size))]
    steps = [*resize, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    pipeline = v2.Compose(steps)
    return ImagePreprocessing(lambda image: pipeline(image).as_subclass(Tensor), mean, std)
