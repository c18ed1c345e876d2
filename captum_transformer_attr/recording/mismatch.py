"""Why a forward failed: inputs of another dtype, or on another device, than the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.recording.inputs import Inputs, label
from captum_transformer_attr.recording.modules import modules_of

IDS = (torch.int32, torch.int64)
PICTURE = 4
"""Axes from which on integers are no token ids."""


def refuse_mismatch(function: Any, inputs: Inputs, error: RuntimeError) -> None:
    """Say what is wrong with the inputs of a forward that failed; return if that is not it.

    Asked only after a failure: a model may well cast or move its inputs itself.

    Raises:
        InputError: naming the entry, what it is and what the model's parameters are.
    """
    parameters = [p for root in modules_of(function) for p in root.parameters() if p.is_floating_point()]
    if not parameters:
        return
    dtypes, devices = {p.dtype for p in parameters}, {p.device for p in parameters}
    dtype, device = parameters[0].dtype, parameters[0].device
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    for name, value in inputs.values.items():
        if not isinstance(value, Tensor):
            continue
        what = f"inputs: {label(inputs, name)}"
        if value.device not in devices:
            raise InputError(
                f"{what} is on {value.device}, the model on {device}; move it with .to('{device}') ({reason})"
            ) from error
        if name not in inputs.explained:
            continue
        if value.is_floating_point() and "'indices'" in reason:  # torch's word for what an embedding looks up
            raise InputError(f"{what} is {value.dtype}: token ids must be torch.int64 ({reason})") from error
        if value.is_floating_point() and value.dtype not in dtypes:
            raise InputError(
                f"{what} is {value.dtype}, the model's parameters are {dtype}; convert it with .to({dtype}) ({reason})"
            ) from error
        if not value.is_floating_point() and (value.dtype not in IDS or value.ndim >= PICTURE):
            raise InputError(
                f"{what} is {value.dtype}: token ids must be torch.int64, everything else {dtype} ({reason})"
            ) from error
