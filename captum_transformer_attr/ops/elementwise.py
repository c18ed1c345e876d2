"""Functions of one element: activations, and scaling by a constant."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.ops.bilinear import unbroadcast
from captum_transformer_attr.ops.stacked import scaled_parts
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.node import Grads, LocalNode, Node
from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.registry import HANDLERS, handles
from captum_transformer_attr.recording.tags import tag_of

BOUNDED = frozenset("sigmoid tanh hardsigmoid hardtanh erf softsign sin cos atan".split())
UNBOUNDED = frozenset(
    """relu gelu silu logsigmoid relu6 leaky_relu elu selu celu mish hardswish softplus prelu rrelu threshold hardshrink
    softshrink tanhshrink log sqrt rsqrt square abs reciprocal pow log1p expm1 clamp clamp_min clamp_max clip log2
    erfc sinh cosh nan_to_num rsqrt sign float_power""".split()
)
CLAMPS = ("clamp", "clamp_min", "clamp_max", "clip")  # their bounds may be tensors, and broadcast
# Other names under which torch dispatches them.
ALIASES = {
    "__pow__": "pow",
    "__abs__": "abs",
    "absolute": "abs",
    "arctan": "atan",
    "log_sigmoid": "logsigmoid",
    "special_expit": "sigmoid",
    **{f"special_{name}": name for name in ("erf", "erfc", "expm1", "log1p")},
}


class Elementwise(LocalNode):
    """``y = f(x)``, every output element a function of one input element."""

    label = "activation"


class Gelu(Elementwise):
    """GELU with torch's own derivative: the most frequent activation is worth not keeping a second graph for."""

    x: Tensor

    def __init__(self, approximate: str) -> None:
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.keep("x", x)
        y = torch.nn.functional.gelu(x, approximate=self.approximate)
        self.keep("y", y)
        self.leaves = (self.x,)
        return y

    def gradient(self, g: Tensor) -> Grads:
        return (torch.ops.aten.gelu_backward(g, self.x, approximate=self.approximate),)


class Scale(Node):
    """``y = c x`` (or ``x / c``) with a constant.

    LayerScale, 1/√d, a mask, a rotation e^{iθ} of channel pairs. ``factor`` is what x was multiplied by.
    """

    label = "scaling"

    def __init__(self, constant: Tensor | float, divide: bool = False) -> None:
        self.constant = constant.detach() if isinstance(constant, Tensor) else constant
        self.divide = divide

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.x_shape = x.shape
        if not self.divide:
            self.factor = self.constant
            return x * self.constant
        # The divisor may be a count of integers: its reciprocal needs the precision of x; torch divides by a plain zero
        # as well.
        divisor = (
            self.constant
            if isinstance(self.constant, Tensor)
            else torch.tensor(self.constant, dtype=x.dtype, device=x.device)
        )
        self.factor = 1 / divisor.to(x.dtype)
        return x / self.constant

    def gradient(self, g: Tensor) -> Grads:
        factor = self.factor.conj() if isinstance(self.factor, Tensor) else self.factor
        return (unbroadcast(g * factor, self.x_shape),)


def scaled(recorder: Recorder, x: Any, factor: Any, divide: bool = False) -> Any:
    """``x * factor``, or ``x / factor``, with a constant factor."""
    if not isinstance(x, Tensor) or not x.requires_grad:
        return x * factor
    if not isinstance(factor, Tensor) and factor == 1:
        return x
    tag = tag_of(x)
    shape = lay.broadcast_shape(x.shape, factor.shape) if isinstance(factor, Tensor) else x.shape
    layout = lay.broadcast([(tag.layout, x.shape)], shape) if tag else None
    kept: dict[str, Any] = (
        {"role": tag.role, "root": tag.root if tag.root >= 0 else tag.origin, "sum_of": tag.sum_of} if tag else {}
    )
    if tag is not None and tag.intact and not (divide and not isinstance(factor, Tensor) and factor == 0):
        kept["parts"] = scaled_parts(tag, x, 1 / factor if divide else factor, shape)
        kept["parts_dim"] = tag.parts_dim
    return recorder.run(Scale(factor, divide), x, layout=layout, **kept)


def apply_elementwise(
    recorder: Recorder, function: Any, name: str, x: Tensor, *args: Any, node: Elementwise | None = None, **kwargs: Any
) -> Any:
    """Record an elementwise function of ``x``, as ``node`` if it is given."""
    if any(isinstance(a, Tensor) and a.requires_grad for a in (*args, *kwargs.values())):
        return NotImplemented
    kwargs.pop("inplace", None)
    if name == "gelu":
        node = Gelu(kwargs.get("approximate", "none"))
    else:
        node = node or Elementwise()
        node.function = lambda t: function(t, *args, **kwargs)
    tag = tag_of(x)
    if tag is None:
        return recorder.run(node, x)
    role = tags.GATE if name in BOUNDED else tags.ACTIVATED
    if tag.role in (tags.STATISTIC, tags.SCORES, tags.PROBABILITY):
        role = tag.role
    if name in ("sqrt", "rsqrt") and tag.role == tags.MEAN:
        role = tags.STATISTIC  # a root of a mean (of squares): the denominator of a normalisation written by hand
    if tag.role == tags.MEAN and name in ("pow", "square", "reciprocal"):
        role = tags.STATISTIC
    return recorder.run(node, x, layout=tag.layout, role=role, root=tag.root if tag.root >= 0 else tag.origin)


def register_elementwise(name: str) -> None:
    function = getattr(torch.nn.functional, name, None) or getattr(torch, name)

    @handles(name)
    def handler(recorder: Recorder, input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, Tensor) or not input.requires_grad:
            return NotImplemented
        if name in CLAMPS:
            with recorder:
                input = functools.reduce(spread_over, (*args, *kwargs.values()), input)
        return apply_elementwise(recorder, function, name, input, *args, **kwargs)


def register_bound(function: Any, *names: str) -> None:
    """Register a function that takes the larger (or smaller) of two values: with a constant it is a clamp, which may
    have another bound for every channel."""

    @handles(*names)
    def handler(recorder: Recorder, input: Any, other: Any = None, *args: Any, **kwargs: Any) -> Any:
        pair = [t for t in (input, other) if isinstance(t, Tensor)]
        live = [t for t in pair if t.requires_grad]
        if args or kwargs or len(pair) != 2 or len(live) != 1:
            return NotImplemented
        bound = other if live[0] is input else input
        with recorder:
            x = spread_over(live[0], bound)
        return apply_elementwise(recorder, function, "clamp", x, bound)


def spread_over(x: Tensor, bound: Any) -> Tensor:
    """``x``, repeated where it is compared with several bounds."""
    shape = lay.broadcast_shape(x.shape, bound.shape) if isinstance(bound, Tensor) else x.shape
    return x if shape == x.shape else x.expand(shape)


for _name in sorted(BOUNDED | UNBOUNDED):
    register_elementwise(_name)
register_bound(torch.maximum, "maximum", "max")
register_bound(torch.minimum, "minimum", "min")
register_bound(torch.fmax, "fmax")
register_bound(torch.fmin, "fmin")
for _alias, _name in ALIASES.items():
    HANDLERS[_alias] = HANDLERS[_name]
