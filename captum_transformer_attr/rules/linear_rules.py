"""Rules of linear maps (linear layers, convolutions), and composites that say which layer gets which: plain data.

Every rule but ``ZBox`` has the form R_in = x ⊙ c. ``coefficients`` gives c, so that tables of relevance and tables of
modified gradients share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from captum_transformer_attr.ops.convolution import Convolution
from captum_transformer_attr.ops.division import divide
from captum_transformer_attr.ops.linear import LinearMap
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.rules.deep_taylor import SMALLEST_SHARE


@dataclass(frozen=True)
class Epsilon:
    """ε rule (Bach et al. 2015, eq. 58): R_in = x ⊙ S W with S = R / (y + ε sign y). The bias keeps its share b S, the
    stabiliser the rest."""

    epsilon: float = 1e-6

    def coefficients(self, node: LinearMap, r: Tensor) -> Tensor:
        s = r / stabilised(node.y, self.epsilon)
        absorb_bias(node, s)
        return node.pullback(s, node.weight)


@dataclass(frozen=True)
class Gamma:
    """γ rule (Montavon et al. 2019) for inputs of any sign (Andéol et al. 2021): contributions of the output's own sign
    count 1 + γ times.

    With z_ij = x_i w_ij, and z⁺ for outputs y > 0, z⁻ for y < 0: R_i = Σ_j (z_ij + γ z_ij^±) / (y_j + γ (Σ_i z_ij^± +
    b_j^±)) R_j.
    """

    gamma: float = 0.25
    epsilon: float = 1e-6

    def coefficients(self, node: LinearMap, r: Tensor) -> Tensor:
        x, y, weight = node.x, node.y, node.weight
        half, magnitude, sign = self.gamma / 2, weight.abs(), y.sign()
        # Σ z⁺ = (Σ z + Σ |z|) / 2 and Σ z⁻ = (Σ z − Σ |z|) / 2, and likewise for w⁺ and w⁻ on the way back.
        total = y + half * (node.unbiased() + sign * node.map(x.abs(), magnitude))
        bias = None
        if node.bias is not None:
            own = torch.where(sign * node.bias > 0, node.bias, 0)
            total = total + self.gamma * own
            bias = node.bias + self.gamma * own
        s = torch.where(sign == 0, 0, r / stabilised(total, self.epsilon))
        if bias is not None:
            node.absorb(lambda: bias * s)
        return (1 + half) * node.pullback(s, weight) + half * x.sign() * node.pullback(s * sign, magnitude)


@dataclass(frozen=True)
class ZPlus:
    """z⁺ rule for inputs of any sign (CVPR 2021, eq. 3-4): only positive contributions count, the bias is ignored.

    An output without any shares its relevance among the negative ones, as in the ``deep_taylor`` table.
    """

    def coefficients(self, node: LinearMap, r: Tensor) -> Tensor:
        x, magnitude = node.x, node.weight.abs()
        size, y = node.map(x.abs(), magnitude), node.unbiased()
        node.absorb(lambda: torch.where(size == 0, r, 0))
        positive = y + size > size * SMALLEST_SHARE[r.dtype]
        s = torch.where(positive, r / (y + size), 0)
        signed = torch.where(positive | (size == 0), s, r / y)
        return node.pullback(signed, node.weight) + x.sign() * node.pullback(s, magnitude)


@dataclass(frozen=True)
class ZBox:
    """z^B rule (Montavon et al. 2017) for inputs between ``low`` and ``high``; None takes each sample's own minimum and
    maximum.

    R = x ⊙ SW − l ⊙ SW⁺ − h ⊙ SW⁻ with S = R_out / (xW − lW⁺ − hW⁻), bias ignored.
    """

    low: float | None = None
    high: float | None = None

    def relevance(self, node: LinearMap, r: Tensor) -> Tensor:
        x, weight = node.x, node.weight
        low, high = self.bounds(node)
        positive, negative = weight.clamp(min=0), weight.clamp(max=0)
        z = node.unbiased() - node.map(low, positive) - node.map(high, negative)
        node.absorb(lambda: torch.where(z == 0, r, 0))
        s = divide(r, z)
        return x * node.pullback(s, weight) - low * node.pullback(s, positive) - high * node.pullback(s, negative)

    def bounds(self, node: LinearMap) -> tuple[Tensor, Tensor]:
        """Lowest and highest input values, of the input's shape."""
        x = node.x
        shape = lay.sample_shape(source_layout(node), x.shape, node.recorder.batch)
        if shape is None:
            # An input nobody rearranged has its examples first.
            shape = (1, node.recorder.batch, x.numel() // node.recorder.batch)
        parts = x.reshape(shape)
        low = parts.amin((0, 2), keepdim=True) if self.low is None else parts.new_full((1, 1, 1), self.low)
        high = parts.amax((0, 2), keepdim=True) if self.high is None else parts.new_full((1, 1, 1), self.high)
        return low.expand(shape).reshape(x.shape), high.expand(shape).reshape(x.shape)


LinearRule = Epsilon | Gamma | ZPlus | ZBox


@dataclass(frozen=True)
class Composite:
    """Which linear map gets which rule; None is the table's own (z⁺ for ``deep_taylor``, the plain gradient for the
    others).

    Attributes:
        linear: linear layers and products with constant matrices.
        convolution: convolutions.
        pixels: the map that reads the pixels of an image or video (only there may it be ``ZBox``, only with
            ``deep_taylor``).
        named: pairs of a pattern of module paths (``"blocks.*.mlp.*"``) and a rule, which win.
    """

    linear: LinearRule | None = None
    convolution: LinearRule | None = None
    pixels: LinearRule | None = None
    named: Sequence[tuple[str, LinearRule]] = field(default=())

    def rule_for(self, node: LinearMap) -> LinearRule | None:
        """The rule of one recorded map."""
        for pattern, rule in self.named:
            if fnmatchcase(node.path, pattern):
                return rule
        if self.pixels is not None and reads_pixels(node):
            return self.pixels
        return self.convolution if isinstance(node, Convolution) else self.linear

    def rules(self) -> list[LinearRule]:
        """Every rule it can give."""
        return [
            r for r in (self.linear, self.convolution, self.pixels, *(rule for _, rule in self.named)) if r is not None
        ]


COMPOSITES = {
    "epsilon": Composite(Epsilon(), Epsilon()),
    "epsilon_plus": Composite(linear=Epsilon(), convolution=ZPlus()),
    "epsilon_gamma_box": Composite(linear=Epsilon(), convolution=Gamma(0.25), pixels=ZBox()),
    "attnlrp_vision": Composite(linear=Gamma(0.05), convolution=Gamma(0.25)),
}
"""Composites by name. ``attnlrp_vision``: the γ of Achtibat et al. 2024 for vision transformers."""


def source_layout(node: LinearMap) -> lay.Layout | None:
    """Layout of the map's input."""
    tag = node.sources[0]
    return tag.layout if tag is not None else None


def reads_pixels(node: LinearMap) -> bool:
    """Whether the map reads an image or video itself: values that were only moved or rescaled since the input."""
    tag = node.sources[0]
    if tag is None or not (0 <= tag.origin < 63 or 0 <= tag.root < 63):
        return False
    if isinstance(node, Convolution):
        return True
    # Patches cut out by a reshape still know the axes of the image they come from.
    return any(label.endswith(".3") for labels in lay.labels(tag.layout) for label in labels)


def stabilised(y: Tensor, epsilon: float) -> Tensor:
    """``y + ε sign(y)``, with sign(0) = 1."""
    return y + torch.where(y < 0, -epsilon, epsilon)


def absorb_bias(node: LinearMap, s: Tensor) -> None:
    """The bias's share b S."""
    bias = node.bias
    if bias is not None:
        node.absorb(lambda: bias * s)
