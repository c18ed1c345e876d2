"""Local weight files."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_transformer_attr.loading.errors import LoadingError, first_line

CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts store the weights."""
NAMED_KEYS = 4


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file: safetensors, or a torch file read with ``weights_only=True``.

    Weights inside a training checkpoint (``{"model": ...}``, ``{"state_dict": ...}``) are taken out, and the prefix
    ``module.`` of data-parallel training is removed.

    Raises:
        LoadingError: if the file is missing, damaged, holds code instead of weights, or no weights at all.
    """
    path = Path(path)
    _check_file(path)
    content: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise LoadingError(
            f"checkpoint {path} is damaged or holds more than weights; save its state_dict() and load that"
        ) from error
    except Exception as error:  # safetensors, zip and pickle readers each have their own exceptions for damage
        raise LoadingError(f"checkpoint {path} cannot be read: {first_line(error)}") from error
    while isinstance(content, Mapping) and not _holds_weights(content):
        inside = next((content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inside is None:
            held = f"its entries are {_some(list(content))}" if content else "it is empty"
            raise LoadingError(f"checkpoint {path} holds no weights: {held}")
        content = inside
    if not isinstance(content, Mapping):
        raise LoadingError(f"checkpoint {path} holds a {type(content).__name__} instead of a state dict")
    weights = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    return weights


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Put the weights of a file into a model; every key must fit.

    Raises:
        LoadingError: as :func:`read_weights`, or naming the keys that are missing, unknown or of another shape.
    """
    weights = read_weights(path)
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    unknown = [key for key in weights if key not in own]
    misshapen = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    problems = [
        f"{what} {_some(keys)}"
        for what, keys in (("missing", missing), ("unknown", unknown), ("wrong shape", misshapen))
        if keys
    ]
    if problems:
        raise LoadingError(f"checkpoint {path} does not fit the model: " + "; ".join(problems))
    broken = [key for key, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise LoadingError(f"checkpoint {path} holds NaN or infinite weights: {_some(broken)}")
    model.load_state_dict(weights, strict=True)


def read_description(path: str | Path) -> dict[str, Any]:
    """The metadata of a safetensors file, each entry decoded from JSON where it is JSON.

    Raises:
        LoadingError: if the file is missing or damaged.
    """
    from safetensors import safe_open

    path = Path(path)
    _check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:  # safetensors' own exception type is not exported for type checkers
        raise LoadingError(f"checkpoint {path} cannot be read: {first_line(error)}") from error
    return {key: _decoded(value) for key, value in metadata.items()}


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise LoadingError(
            f"checkpoint {path} {'is a folder; name the file in it' if path.is_dir() else 'does not exist'}"
        )


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _holds_weights(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in content.values()) and not any(
        isinstance(content.get(key), Mapping) for key in CONTAINERS
    )


def _some(keys: list[Any]) -> str:
    shown = ", ".join(str(key) for key in keys[:NAMED_KEYS])
    return shown + (f" and {len(keys) - NAMED_KEYS} more" if len(keys) > NAMED_KEYS else "")
