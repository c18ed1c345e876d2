"""A softmax that the model writes out, exponentials divided by their sum, is recorded as what it is.

Local rules of exp, sum and quotient would be right as well, but another explanation than that of the same model with
``softmax``: its attention would not be found, and no table would freeze it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.ops.bilinear import MatMul
from captum_transformer_attr.ops.elementwise import Elementwise, Scale, apply_elementwise
from captum_transformer_attr.ops.pooling import Pool
from captum_transformer_attr.ops.residual import ConstantSum
from captum_transformer_attr.ops.softmax import Softmax, softmax_of, unshifted
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.node import node_of
from captum_transformer_attr.recording.recorder import Recorder, node_behind
from captum_transformer_attr.recording.registry import handles
from captum_transformer_attr.recording.tags import tag_of


class Exponential(Elementwise):
    """``base ** power``; ``power`` is live."""

    label = "exponential"
    power: Tensor
    base: float = math.e

    def exponent(self, recorder: Recorder) -> Tensor:
        """The live logarithm of the exponential."""
        with recorder:
            return self.power if self.base == math.e else self.power * math.log(self.base)


@handles("exp")
def exponential(recorder: Recorder, input: Tensor) -> Any:
    logarithm = node_of(input)
    if isinstance(logarithm, Softmax) and logarithm.logits is not None:  # log_softmax(...).exp()
        return softmax_of(recorder, logarithm.logits, logarithm.dim)
    node = Exponential()
    node.power = input
    return apply_elementwise(recorder, torch.exp, "exp", input, node=node)


@handles("exp2", "special_exp2")
def power_of_two(recorder: Recorder, input: Tensor) -> Any:
    node = Exponential()
    node.power, node.base = input, 2.0
    return apply_elementwise(recorder, torch.exp2, "exp2", input, node=node)


@handles("__rpow__")
def power_of_constant(recorder: Recorder, input: Tensor, other: Any) -> Any:
    """``other ** input``."""
    base = float(other) if not isinstance(other, Tensor) or other.numel() == 1 else 0.0
    if base <= 0:
        return NotImplemented
    node = Exponential()
    node.power, node.base = input, base
    return apply_elementwise(recorder, lambda x: torch.pow(base, x), "exp", input, node=node)


@handles("pow", "__pow__", "float_power")
def power(recorder: Recorder, input: Any, exponent: Any) -> Any:
    """A live base, or a constant one."""
    if isinstance(exponent, Tensor) and exponent.requires_grad:
        constant = not isinstance(input, Tensor) or not input.requires_grad
        return power_of_constant(recorder, exponent, input) if constant else NotImplemented
    return apply_elementwise(recorder, torch.pow, "pow", input, exponent)


def written_softmax(recorder: Recorder, numerator: Tensor, total: Tensor, divide: bool) -> Tensor | None:
    """Exponentials divided by their total (or times its reciprocal) as a softmax of the exponents; None if it is none.

    A constant added to the total (a sink, a guard against 0) stays part of it. Zeros by which exponentials were
    multiplied are a mask. Exponentials may have been multiplied by the values before they are divided.
    """
    product = node_of(numerator)
    if isinstance(product, MatMul) and product.factors:
        softmax = written_softmax(recorder, product.factors[0], total, divide)
        with recorder:
            return None if softmax is None else softmax @ product.factors[1]
    exponential, hidden = exponential_of(recorder, numerator)
    axes = [i for i, (a, b) in enumerate(zip(numerator.shape, total.shape, strict=False)) if a != 1 == b]
    if exponential is None or numerator.ndim != total.ndim or len(axes) != 1:
        return None
    dim, constant = axes[0], False
    node = node_behind(recorder, tag_of(total))
    while isinstance(node, ConstantSum) or (isinstance(node, Elementwise) and not isinstance(node, Exponential)):
        constant |= isinstance(node, ConstantSum)
        node = node_behind(recorder, node.sources[0])
    if not isinstance(node, Pool) or node_behind(recorder, node.sources[0]) is not node_of(numerator):
        return None
    e, divisor = numerator.detach(), total.detach() if divide else 1 / total.detach()
    sink = divisor - e.sum(dim, keepdim=True)
    if not constant and not torch.allclose(sink, torch.zeros_like(sink), atol=1e-5 * float(divisor.abs().max())):
        return None  # not their sum
    exponents = exponential.exponent(recorder)
    exponents = exponents if constant else unshifted(exponents, dim)
    if hidden is not None:
        with recorder:
            exponents = exponents.masked_fill(hidden, -math.inf)
    if not constant:
        return softmax_of(recorder, exponents, dim)
    softmax_with_sink = Softmax()
    softmax_with_sink.function = lambda x: x.exp() / (x.exp().sum(dim, keepdim=True) + sink)
    tag = tag_of(exponents)
    return recorder.run(softmax_with_sink, exponents, layout=tag.layout if tag else None, role=tags.PROBABILITY)


def exponential_of(recorder: Recorder, tensor: Tensor) -> tuple[Exponential | None, Tensor | None]:
    """The exponential that a tensor is, and what a mask of zeros hides of it."""
    node, hidden = node_of(tensor), None
    if isinstance(node, Scale) and isinstance(node.factor, Tensor) and is_mask(node.factor):
        hidden, node = node.factor == 0, node_behind(recorder, node.sources[0])
    return (node, hidden) if isinstance(node, Exponential) else (None, None)


def is_mask(factor: Tensor) -> bool:
    """Whether a factor is made of zeros and ones."""
    return bool(((factor == 0) | (factor == 1)).all())
