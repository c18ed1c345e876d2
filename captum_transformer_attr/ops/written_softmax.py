"""A softmax that the model writes out, exponentials divided by their sum, is recorded as what it is.

Local rules of exp, sum and quotient would be right as well, but another explanation than that of the same model with
``softmax``: its attention would not be found, and no table would freeze it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from captum_transformer_attr.errors import UnsupportedOperationError
from captum_transformer_attr.ops.bilinear import MatMul
from captum_transformer_attr.ops.elementwise import Elementwise, Scale, apply_elementwise
from captum_transformer_attr.ops.pooling import Pool
from captum_transformer_attr.ops.residual import ConstantSum, Sum
from captum_transformer_attr.ops.shape import Join
from captum_transformer_attr.ops.softmax import Softmax, run_softmax, shift_of, softmax_of, unshifted
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.leaving import place
from captum_transformer_attr.recording.node import Node, node_at, node_of
from captum_transformer_attr.recording.recorder import Recorder, node_behind
from captum_transformer_attr.recording.registry import HANDLERS, handles
from captum_transformer_attr.recording.tags import Tag, tag_of


class Exponential(Elementwise):
    """``base ** power``; ``power`` is live."""

    label = "exponential"
    power: Tensor
    base: float = math.e
    keeps_live = ("power",)

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
    return power_of_constant(recorder, input, 2.0)


def hide(name: str, mask_of: Callable[..., Tensor | None]) -> None:
    """Register a function that replaces some of its input by zeros; ``mask_of(input, ...)`` tells which."""

    @handles(name)
    def handler(recorder: Recorder, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not input.requires_grad or exponential_of(recorder, input)[0] is None:
            return NotImplemented
        hidden = mask_of(input, *args, **kwargs)
        if hidden is None:
            return NotImplemented
        with recorder:
            return torch.where(hidden, 0.0, input)


def filled(input: Tensor, mask: Tensor, value: Any) -> Tensor | None:
    return mask if not isinstance(value, Tensor) and value == 0 else None


def outside(name: str) -> Callable[..., Tensor]:
    """What ``tril`` or ``triu`` replaces by zeros."""

    def mask_of(input: Tensor, diagonal: int = 0) -> Tensor:
        everything = torch.ones(input.shape[-2:], dtype=torch.bool, device=input.device)
        return ~getattr(everything, name)(diagonal)

    return mask_of


hide("masked_fill", filled)
for _name in ("tril", "triu"):
    hide(_name, outside(_name))


@handles("__rpow__")
def power_of_constant(recorder: Recorder, input: Tensor, other: Any) -> Any:
    """``other ** input``."""
    base = float(other) if not isinstance(other, Tensor) or other.numel() == 1 else 0.0
    if base <= 0:
        return NotImplemented
    node = Exponential()
    node.power, node.base = input, base
    return apply_elementwise(recorder, lambda x: torch.pow(base, x), "exp", input, node=node)


power_of_live = HANDLERS["pow"]


@handles("pow", "__pow__")
def power(recorder: Recorder, input: Any, exponent: Any) -> Any:
    """Of a live base elementwise like any function, of a constant one an exponential."""
    if isinstance(input, Tensor) and input.requires_grad:
        return power_of_live(recorder, input, exponent)
    return power_of_constant(recorder, exponent, input)


def written_softmax(recorder: Recorder, numerator: Tensor, total: Tensor, divide: bool) -> Tensor | None:
    """Exponentials divided by their total (or times its reciprocal) as a softmax of the exponents; None if it is none.

    A constant added to the total (a sink, a guard against 0) stays part of it. Zeros in the place of exponentials are a
    mask. Exponentials may have been multiplied by the values before they are divided.
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
    divisor = divisor_of(recorder, numerator, total.detach() if divide else 1 / total.detach(), tag_of(total), axes[0])
    axis = axis_before(numerator.shape, axes[0], exponential.shape)
    if divisor is None or axis is None:
        return None
    sink, peak = divisor
    exponents = exponential.exponent(recorder)
    if peak is not None:
        apart = shift_of(exponents, axis)
        if apart is None or not same_shift(recorder, apart[1], peak.power):
            return None
        exponents, sink = apart[0], torch.ones_like(sink)
    elif not bool(sink.any()):
        exponents = unshifted(exponents, axis)
    with recorder:
        exponents = exponents if exponents.shape == numerator.shape else exponents.reshape(numerator.shape)
        exponents = exponents if hidden is None else exponents.masked_fill(hidden, -math.inf)
    return softmax_with_sink(recorder, exponents, axes[0], sink)


def divisor_of(
    recorder: Recorder, numerator: Tensor, divisor: Tensor, tag: Tag | None, dim: int
) -> tuple[Tensor, Exponential | None] | None:
    """What a divisor holds beside the sum of the numerator: constants, or one further exponential; None if no sum."""
    sink, peak = numerator.new_zeros(()), None
    node = node_behind(recorder, tag)
    while isinstance(node, (ConstantSum, Sum)) or (isinstance(node, Elementwise) and not isinstance(node, Exponential)):
        sources = [(node_behind(recorder, source), source) for source in node.sources]
        if isinstance(node, Sum):
            further = [found for found, _ in sources if isinstance(found, Exponential)]
            if len(further) != 1 or peak is not None or bool(sink.any()):
                return None
            peak, sink = further[0], further[0].y.detach()
            sources = [(found, source) for found, source in sources if found is not peak]
        elif isinstance(node, ConstantSum):
            if peak is not None:
                return None
            sink = sink + node.constant
        node = sources[0][0]
    of_numerator = tag_of(numerator)
    if not isinstance(node, Pool) or node.sources[0] is None or of_numerator is None:
        return None
    # What stands between (a reciprocal, a lower bound, roots) counts by its value.
    wanted = numerator.detach().sum(dim, keepdim=True) + sink
    same = torch.allclose(divisor, wanted, atol=1e-5 * float(divisor.abs().max()))
    return (sink, peak) if same and node.sources[0].origin == of_numerator.origin else None


def refuse_pieces(recorder: Recorder, numerator: Tensor, total: Tensor, divide: bool) -> None:
    """
    Raises:
        UnsupportedOperationError: if exponentials of scores that were computed apart (blocks of keys, as in a flash
            attention written out) are summed and divided by their total: together they are a softmax.
    """
    first = node_behind(recorder, tag_of(total))
    if not divide and isinstance(first, Elementwise):  # times the reciprocal
        first = node_behind(recorder, first.sources[0])
    summed = exponentials_in(recorder, first, summed_only=True)
    if len(summed) > 1 and summed & exponentials_in(recorder, node_behind(recorder, tag_of(numerator))):
        raise UnsupportedOperationError(
            f"{place(recorder.path)} computes a softmax piece by piece, from the exponentials of several blocks of "
            "keys and their total: its attention map is nowhere. Way out: one softmax over all keys, or "
            "F.scaled_dot_product_attention."
        )


def exponentials_in(recorder: Recorder, node: Node | None, summed_only: bool = False) -> set[Exponential]:
    """The exponentials of scores that a value is made of by sums and products; ``summed_only``: over an axis."""
    found, seen = set(), set()
    stack = [(node, not summed_only)]
    while stack:
        node, counts = stack.pop()
        if node is None or (node, counts) in seen:
            continue
        seen.add((node, counts))
        if isinstance(node, Exponential):
            source = node.sources[0]
            if counts and source is not None and source.role == tags.SCORES:
                found.add(node)
        elif isinstance(node, (Sum, ConstantSum, Scale, MatMul, Pool, Join)) or node.label == "product":
            counts = counts or isinstance(node, Pool)
            stack += [(node_behind(recorder, source), counts) for source in node.sources]
    return found


def same_shift(recorder: Recorder, shift: Tensor, power: Tensor) -> bool:
    """Whether a further exponential is that of what was added to the scores: of a score of 0."""
    found = [node_behind(recorder, tag_of(t)) for t in (shift, power)]
    origins = [node.sources[0].origin for node in found if isinstance(node, Scale) and node.sources[0] is not None]
    return len(origins) == 2 and origins[0] == origins[1] and torch.equal(shift, power)


def softmax_with_sink(recorder: Recorder, exponents: Tensor, dim: int, sink: Tensor) -> Tensor:
    """Record a softmax that leaves some of its weight, ``sink / (Σ exp(x) + sink)``, to no key."""
    if not bool(sink.any()):
        return softmax_of(recorder, exponents, dim)

    def function(x: Tensor) -> Tensor:
        largest = x.detach().amax(dim, keepdim=True).clamp(min=0)
        e = (x - largest).exp()
        return e / (e.sum(dim, keepdim=True) + sink * (-largest).exp())

    return run_softmax(recorder, Softmax(), function, exponents, tags.PROBABILITY)


# What torch records where axes are only grouped in another way.
REGROUPING = frozenset(
    """ViewBackward0 UnsafeViewBackward0 ReshapeAliasBackward0 UnsqueezeBackward0 SqueezeBackward0 SqueezeBackward1
    SqueezeBackward2 CloneBackward0""".split()
)


def exponential_of(recorder: Recorder, tensor: Tensor) -> tuple[Exponential | None, Tensor | None]:
    """The exponential whose entries a tensor holds in their order, and which of them are hidden by zeros."""
    fn: Any = tensor.grad_fn
    node, masks = None, []
    while fn is not None:
        node = node_at(fn)
        if node is None and fn.name() in REGROUPING:
            fn = fn.next_functions[0][0]
        elif isinstance(node, (Scale, Join)) and len(node.sources) == 1:
            masks.append(node)
            fn = recorder.edges[node.tag.origin].node.next_functions[0][0]
        else:
            break
    if not isinstance(node, Exponential) or node.shape.numel() != tensor.numel():
        return None, None
    hidden = None
    for zeros in map(zeros_of, masks):
        if zeros is None or zeros.numel() != tensor.numel():
            return None, None
        zeros = zeros.reshape(tensor.shape)
        hidden = zeros if hidden is None else hidden | zeros
    return node, hidden


def zeros_of(node: Scale | Join) -> Tensor | None:
    """Which entries of its input an operation replaces by zeros, of the output's shape; None if it does more."""
    if isinstance(node, Scale):
        return (node.factor == 0).expand(node.shape) if is_mask(node.factor) else None
    hidden = ~node.live_positions()
    return hidden if node.leaves[0].shape == node.shape and bool((node.y[hidden] == 0).all()) else None


def axis_before(shape: torch.Size, dim: int, before: torch.Size) -> int | None:
    """Which axis of ``before``, in the same order of entries, is axis ``dim`` of ``shape``; None if none is."""
    inner = shape[dim + 1 :].numel()
    same = [i for i, size in enumerate(before) if size == shape[dim] and before[i + 1 :].numel() == inner]
    return same[0] if same else None


def is_mask(factor: Tensor | float) -> TypeGuard[Tensor]:
    """Whether a factor is made of zeros and ones."""
    return isinstance(factor, Tensor) and bool(((factor == 0) | (factor == 1)).all())
