"""Rules that users register for modules and torch functions of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from captum_transformer_attr.errors import UnsupportedOperationError
from captum_transformer_attr.ops.division import divide
from captum_transformer_attr.recording.node import Grads, LocalNode
from captum_transformer_attr.recording.registry import MODULE_RULES

RelevanceRule = Callable[..., Any]
KINDS = ("identity", "gradient_x_input")


class Custom(LocalNode):
    """A module (or function) taken as one operation: torch's own gradient inside, the registered rule for relevance."""

    def __init__(self, rule: CustomRule, module: nn.Module, leaves: list[Tensor], y: Tensor) -> None:
        self.rule, self.label = rule, f"module {type(module).__name__}"
        self.leaves, self.y = tuple(leaves), y  # the graph between them was made while the module ran

    def gradient(self, g: Tensor) -> Grads:
        return LocalNode.gradient(self, g.to(self.y.dtype))

    def forward(self, *live: Tensor) -> Tensor:
        return self.y.detach().to(live[0].dtype, copy=True)


class CustomRule:
    """How relevance and token flow pass an atomic module.

    Attributes:
        relevance: ``"identity"`` (the first input gets the output's relevance, shapes permitting),
            ``"gradient_x_input"`` (R_in = x ⊙ ∂(S·y)/∂x with S = R / y: LRP-0 of the linearised module), or a function
            ``rule(inputs, output, relevance) -> relevance of every input``.
        flow: the same choices for token flow, where the signal's channel sum is a token's relevance; default
            ``"identity"``.
    """

    def __init__(self, relevance: str | RelevanceRule, flow: str | RelevanceRule) -> None:
        self.relevance, self.flow = relevance, flow

    def operation(self, module: nn.Module, leaves: list[Tensor], y: Tensor) -> Custom:
        """The one operation that a module is, from ``leaves`` to ``y``."""
        return Custom(self, module, leaves, y)

    def send(self, node: Custom, r: Tensor, which: str | RelevanceRule) -> Grads:
        """Relevance of every live input of the module."""
        inputs = tuple(leaf.detach() for leaf in node.leaves)
        if which == "identity":
            which = first_input
        if which == "gradient_x_input":
            grads = node.gradient(divide(r, node.y.detach()))
            return tuple(None if g is None else x * g for x, g in zip(inputs, grads, strict=True))
        assert callable(which)
        result = which(inputs, node.y.detach(), r)
        result = result if isinstance(result, tuple) else (result,)
        shapes = [None if part is None else tuple(part.shape) for part in result]
        if len(result) != len(inputs) or any(
            s not in (None, tuple(x.shape)) for s, x in zip(shapes, inputs, strict=True)
        ):
            raise UnsupportedOperationError(
                f"the rule registered for module '{node.path}' gives relevance of shapes {shapes} for inputs of shapes "
                f"{[tuple(x.shape) for x in inputs]}. "
                f"Way out: return one tensor (or None) per floating input, of its shape."
            )
        return result


def first_input(inputs: tuple[Tensor, ...], output: Tensor, relevance: Tensor) -> Grads:
    """Everything to the first input, element by element."""
    return (relevance, *(None,) * (len(inputs) - 1))


def register_rule(
    module: type[nn.Module], relevance: str | RelevanceRule = "identity", flow: str | RelevanceRule = "identity"
) -> None:
    """Teach the engine a module class: it becomes one operation, whatever happens inside it.

    Args:
        module: the class; subclasses follow it unless they have a rule of their own. None of its instances is changed.
        relevance: ``"identity"`` for norms, activations and anything token- and channel-wise that rescales;
            ``"gradient_x_input"`` for locally linear maps; or ``rule(inputs, output, relevance)`` that returns one
            relevance per floating input. Keep the total: Σ of what you return = Σ of what arrived, per example. For
            tables that carry modified gradients the ordinary gradient is used.
        flow: the same for the token flow of the token-level methods.

    Raises:
        TypeError: if ``module`` is not an ``nn.Module`` class, or a rule is neither one of the names nor callable.

    Example:
        >>> class Swirl(torch.nn.Module):
        ...     def forward(self, x):
        ...         return MySwirlFunction.apply(x)
        >>> register_rule(Swirl, relevance="identity")
    """
    if not (isinstance(module, type) and issubclass(module, nn.Module)):
        raise TypeError(f"register_rule: expected an nn.Module class, got {module!r}")
    for name, rule in (("relevance", relevance), ("flow", flow)):
        if not callable(rule) and rule not in KINDS:
            raise TypeError(f"register_rule: {name}={rule!r} is neither a function nor one of {', '.join(KINDS)}")
    MODULE_RULES[module] = CustomRule(relevance, flow)


def unregister_rule(module: type[nn.Module]) -> None:
    """Forget a registered rule; unknown classes are ignored."""
    MODULE_RULES.pop(module, None)
