"""Whether a recorded forward gives what the plain one gives, and an example in a batch what it gives alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.errors import UnsupportedModelError
from captum_transformer_attr.recording.inputs import Inputs, private
from captum_transformer_attr.recording.modules import Modules
from captum_transformer_attr.recording.node import LayoutLostError
from captum_transformer_attr.recording.outputs import OutputChoice, unwrap
from captum_transformer_attr.recording.quantised import AGREEMENT as QUANTISED_AGREEMENT
from captum_transformer_attr.recording.quantised import quantised_layers

# How far the recorded forward may be from the plain one, relative to the largest output: rounding, not more.
AGREEMENT = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 0.05, torch.bfloat16: 0.2}


def verify(
    function: Any,
    inputs: Inputs,
    output: OutputChoice,
    recorded_output: Tensor,
    autocast: torch.dtype | None,
    put_back: Callable[[], None],
) -> None:
    """Compare with plain forwards; ``put_back`` gives the model the state it was found in.

    Raises:
        UnsupportedModelError: if the recorded forward does not give what the plain forward gives.
        LayoutLostError: if the examples of the batch influence each other.
    """
    plain = compare(function, inputs, output, recorded_output, autocast)
    if inputs.batch > 1:
        put_back()
        refuse_mixing(function, inputs, output, plain, autocast)


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


def refuse_mixing(
    function: Any, inputs: Inputs, output: OutputChoice, plain: Tensor, autocast: torch.dtype | None
) -> None:
    """An example that influences others cannot be explained together with them: its scores would be theirs.

    Batch statistics and means over the batch do so.

    Looks at the last example. What a model cannot compute alone, or gives another shape alone (scores of all pairs), is
    left to the layouts.

    Raises:
        LayoutLostError: so that the examples are explained one by one, and each gets what it would get alone.
    """
    last = inputs.batch - 1
    try:
        alone = plain_forward(function, inputs.example(last), output)
    except Exception:  # noqa: BLE001  arguments that belong to the whole batch
        return
    if alone.ndim == 0 or alone.shape[0] != 1 or plain.shape != (inputs.batch, *alone.shape[1:]):
        return
    together = plain[last:].double()
    finite = together.isfinite() & alone.isfinite()
    if not bool(finite.any()):
        return
    size = together[finite].abs().max().item()
    allowed = agreement_of(function, plain, autocast) * max(size, 1e-3)
    if (together - alone.double())[finite].abs().max().item() > allowed:
        raise LayoutLostError("the examples of this batch influence each other")


def compare(
    function: Any, inputs: Inputs, output: OutputChoice, recorded_output: Tensor, autocast: torch.dtype | None = None
) -> Tensor:
    """The recorded forward equals the plain one, which is returned, to rounding, or the call fails."""
    plain = plain_forward(function, inputs, output)
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
    return plain
