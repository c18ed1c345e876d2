"""Reading option values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.loading import PreprocessingOptions


def image_options(size: str | None, mean: str | None, std: str | None, squash: bool) -> PreprocessingOptions:
    """Preprocessing from ``--size``, ``--mean``, ``--std`` and ``--squash``.

    Raises:
        InputError: if a value cannot be read.
    """
    return PreprocessingOptions(_size(size), _channels("--mean", mean), _channels("--std", std), squash)


def torch_device(name: str) -> torch.device:
    """A device from its name; ``auto`` is CUDA where there is one.

    Raises:
        InputError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def split_commas(values: Sequence[str]) -> list[str]:
    """``["a,b", "c"]`` as ``["a", "b", "c"]``."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdigit() for part in parts):
        raise InputError(f"--size {text!r} must be one number or heightxwidth")
    return int(parts[0]), int(parts[-1])


def _channels(option: str, text: str | None) -> tuple[float, float, float] | None:
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 3):
        raise InputError(f"{option} {text!r} must be one number or three, separated by commas")
    red, green, blue = values if len(values) == 3 else values * 3
    return red, green, blue
