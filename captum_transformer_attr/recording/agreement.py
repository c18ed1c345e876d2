"""Whether a recorded forward gives what the plain one gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.errors import UnsupportedModelError
from captum_transformer_attr.recording.inputs import Inputs, private
from captum_transformer_attr.recording.modules import Modules
from captum_transformer_attr.recording.outputs import OutputChoice, unwrap
from captum_transformer_attr.recording.quantised import AGREEMENT as QUANTISED_AGREEMENT
from captum_transformer_attr.recording.quantised import quantised_layers

# How far the recorded forward may be from the plain one, relative to the largest output: rounding, not more.
AGREEMENT = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 0.05, torch.bfloat16: 0.2}


def plain_forward(function: Any, inputs: Inputs, output: OutputChoice) -> Tensor:
    """What the model gives without us."""
    with torch.no_grad():
        args, kwargs = inputs.arguments({name: private(value) for name, value in inputs.values.items()})
        return unwrap(function(*args, **kwargs), output)


def agreement_of(function: Any, plain: Tensor, autocast: torch.dtype | None) -> float:
    """How far two forwards may be apart, relative to the largest output."""
    if quantised_layers(m for _, m in Modules(function).named):
        return QUANTISED_AGREEMENT
    return max(AGREEMENT[plain.dtype], 0.0 if autocast is None else AGREEMENT[autocast])


def compare(function: Any, plain: Tensor, recorded_output: Tensor, autocast: torch.dtype | None = None) -> None:
    """The recorded forward equals the plain one to rounding.

    Raises:
        UnsupportedModelError: if it does not.
    """
    if plain.shape != recorded_output.shape:
        raise UnsupportedModelError(
            f"the recorded forward gives shape {tuple(recorded_output.shape)}, the plain one {tuple(plain.shape)}"
        )
    recorded_output = recorded_output.detach()
    finite = plain.isfinite()
    difference = (plain.double() - recorded_output.double()).abs()[finite]
    worst = difference.max().item() if difference.numel() else 0.0
    size = plain[finite].abs().max().item() if difference.numel() else 0.0
    allowed = agreement_of(function, plain, autocast) * max(size, 1e-3)
    if not worst <= allowed or not torch.equal(finite, recorded_output.to(plain.dtype).isfinite()):
        raise UnsupportedModelError(
            f"the recorded forward differs from the plain one by {worst:.2g} (outputs up to {size:.2g}): the model is "
            "random in evaluation mode or "
            "computes in a way that cannot be followed; make it deterministic, or register_rule for the module in "
            "question"
        )
