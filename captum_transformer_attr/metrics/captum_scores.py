"""Captum's own two metrics in one call."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.metrics._inputs import checked, whole_number
from captum_transformer_attr.recording.outputs import ForwardWrapper


class CaptumScores(NamedTuple):
    """Per example, (N,) each; lower is better for both.

    Attributes:
        infidelity: mean square of (perturbation * attribution - change of the output), Yeh et al., NeurIPS 2019.
        sensitivity_max: largest relative change of the attribution in a small neighbourhood, same paper.
    """

    infidelity: Tensor
    sensitivity_max: Tensor


def infidelity_and_sensitivity(
    attribution: Any,
    inputs: Tensor | tuple[Tensor, ...],
    target: Any = None,
    additional_forward_args: Any = None,
    *,
    attributions: Tensor | tuple[Tensor, ...] | None = None,
    noise: float = 0.05,
    radius: float = 0.02,
    samples: int = 10,
    normalize: bool = True,
    max_examples_per_batch: int | None = None,
    seed: int = 0,
    **attribute_arguments: Any,
) -> CaptumScores:
    """Runs `captum.metrics.infidelity` and `captum.metrics.sensitivity_max` for a Captum attribution class.

    Args:
        attribution: an attribution object, ours or Captum's; its model's ModelOutput is unwrapped to the logits.
        inputs: floating tensors; token ids cannot be moved by a little, explain their embeddings instead.
        target, additional_forward_args, attribute_arguments: as for `attribution.attribute`.
        attributions: its result for these inputs, computed here if not given.
        noise: standard deviation of the Gaussian perturbation of infidelity, in the inputs' units.
        radius: half the side of the cube that sensitivity_max draws from, in the inputs' units.
        samples: perturbations per example, for each metric.
        normalize: let infidelity scale every attribution by its best factor first; without it, methods on other scales
            than the output's cannot be compared.
        max_examples_per_batch: Captum's limit on examples times samples in one forward.
        seed: of both metrics; the caller's random state is left alone.

    Raises:
        InputError: integer inputs, no samples, a negative noise or radius, attributions that hold NaN.
    """
    samples, seed = whole_number(samples, "samples", 1), whole_number(seed, "seed")
    for name, size in (("noise", noise), ("radius", radius)):
        if not isinstance(size, Real) or not size >= 0:
            raise InputError(f"{name} must be a number of at least 0, got {size!r}")
    tensors = (inputs,) if isinstance(inputs, Tensor) else inputs if isinstance(inputs, tuple) else ()
    if not tensors or not all(isinstance(t, Tensor) and t.is_floating_point() for t in tensors):
        raise InputError("inputs must be floating tensors: token ids cannot be perturbed, explain their embeddings")
    if attributions is None:
        attributions = attribution.attribute(
            inputs, target=target, additional_forward_args=additional_forward_args, **attribute_arguments
        )
    for part in attributions if isinstance(attributions, tuple) else (attributions,):
        checked(part)

    def explain(*args: Any, **options: Any) -> Any:
        # sensitivity_max flattens by .view, which expanded maps (equal channels) do not allow.
        result = attribution.attribute(*args, **options)
        return result.contiguous() if isinstance(result, Tensor) else tuple(part.contiguous() for part in result)

    shared: dict[str, Any] = {
        "target": target,
        "additional_forward_args": additional_forward_args,
        "n_perturb_samples": samples,
        "max_examples_per_batch": max_examples_per_batch,
    }
    forward, perturb = ForwardWrapper(attribution.forward_func), gaussian_perturbation(noise)
    devices = [tensors[0].device] if tensors[0].is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        with torch.no_grad():
            first = infidelity(forward, perturb, inputs, attributions, normalize=normalize, **shared)
        torch.manual_seed(seed)
        second = sensitivity_max(explain, inputs, perturb_radius=radius, **shared, **attribute_arguments)
    return CaptumScores(first.detach(), second.detach())


def gaussian_perturbation(deviation: float) -> Callable[..., tuple[Any, Any]]:
    """What Captum's infidelity asks for: inputs -> (what is subtracted, the inputs without it)."""

    def perturb(*args: Any) -> tuple[Any, Any]:
        values = args[0] if isinstance(args[0], tuple) else args
        moves = tuple(deviation * torch.randn_like(value) for value in values)
        moved = tuple(value - move for value, move in zip(values, moves, strict=True))
        return (moves, moved) if isinstance(args[0], tuple) else (moves[0], moved[0])

    return perturb
