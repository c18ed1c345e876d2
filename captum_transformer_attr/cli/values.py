"""Reading option values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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


def names_in(option: str, values: Sequence[str], default: Sequence[str]) -> list[str]:
    """The names that an option lists, separated by commas or repeated; ``default`` where it is not given.

    Raises:
        InputError: if it is given and names nothing.
    """
    names = split_commas(values)
    if values and not names:
        raise InputError(f"{option} {values[0]!r} names nothing; leave it out for the default")
    return names or list(default)


def output_file(option: str, path: Path) -> Path:
    """A path to write to.

    Raises:
        InputError: if it is empty.
    """
    if not path.name:
        raise InputError(f"{option} needs the name of a file")
    return path


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
