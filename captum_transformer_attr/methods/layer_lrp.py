"""LayerTransformerLRP: relevance of what enters or leaves layers of the model, in Captum's layer family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from captum.attr import LayerGradientXActivation
from torch import Tensor, nn

from captum_transformer_attr.captum_compat import log_usage
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.methods.base import finished, parsed
from captum_transformer_attr.methods.propagation import propagate, start_of
from captum_transformer_attr.methods.transformer_lrp import TransformerLRP
from captum_transformer_attr.recording.outputs import OutputChoice
from captum_transformer_attr.recording.session import Recording
from captum_transformer_attr.recording.tap import Tap
from captum_transformer_attr.rules.linear_rules import Composite
from captum_transformer_attr.rules.relevance_tables import GRADIENT_TABLES

Layers = list[tuple[Tensor, ...]]


class LayerTransformerLRP(LayerGradientXActivation):  # type: ignore[misc]
    """Relevance of a layer's output (or input) under the rules of ``TransformerLRP``, of the layer's own shape.

    Takes the place of ``LayerGradientXActivation`` in ``LLMGradientAttribution``, ``NoiseTunnel`` and everything else
    that accepts one.

    Args:
        model: any module, or a function around one; used as it is, in evaluation mode, and left as found.
        layer: a module of the model, or a list of them: then ``attribute`` returns a list.
        rules, composite, explained, output: see ``TransformerLRP``.
        device_ids: as in Captum's layer methods; unused, the model runs on the devices it is on.
        multiply_by_inputs: False for the modified gradient itself instead of x ⊙ g (not with ``deep_taylor``, which has
            none).

    Raises:
        InputError: for an unknown option.

    Example:
        >>> layer = LayerTransformerLRP(model, model.blocks[3], rules="attnlrp")
        >>> relevance = layer.attribute(pixels, target=281)  # (N, tokens, channels)
    """

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        rules: str = "deep_taylor",
        composite: str | Composite | None = None,
        explained: str = "logit",
        output: OutputChoice = None,
        device_ids: list[int] | None = None,
        multiply_by_inputs: bool = True,
    ) -> None:
        LayerGradientXActivation.__init__(self, model, layer, device_ids, multiply_by_inputs)
        if not multiply_by_inputs and rules not in GRADIENT_TABLES:
            raise InputError(
                f"multiply_by_inputs=False: rules='{rules}' carries relevance, not a gradient; "
                f"choose {', '.join(GRADIENT_TABLES)}"
            )
        self.lrp = TransformerLRP(model, rules, composite, explained, output)

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Relevance of the layers.

        Args:
            inputs, target, additional_forward_args: as in ``TransformerLRP.attribute``.
            attribute_to_layer_input: what enters the layer instead of what leaves it.
            grad_kwargs: accepted for Captum's callers; the backward pass here needs none.

        Returns:
            A tensor of the layer's shape, a tuple if several floating tensors enter or leave it; for a list of layers
            a list of these. A module that runs several times is explained where it ran last. As in Captum's layer
            methods a tensor's relevance is that of everything made from it, also beside the layer.

        Raises:
            InputError: if a layer is not part of the model, or saw nothing that depends on the inputs.
        """
        single = isinstance(self.layer, nn.Module)
        layers = layers_of(self.layer)
        # Of this call alone: threads may share the object. LLMGradientAttribution and others exchange the forward
        # function of a copy.
        lrp = copy.copy(self.lrp)
        lrp.forward_func = self.forward_func
        given = parsed(inputs, additional_forward_args)
        lrp.tap = tap = Tap(self.forward_func, layers, attribute_to_layer_input)
        results = lrp.explain(given, target, lambda recording: self.compute(recording, tap), join_layers)
        packed = [result[0] if len(result) == 1 else result for result in results]
        return packed[0] if single else packed

    def compute(self, recording: Recording, tap: Tap) -> Layers:
        """One backward pass to all layers."""
        groups = [tap.of(position) for position in range(len(tap.layers))]
        tensors = [t for group in groups for t in group]
        factors = [tap.factor(t) if self.multiplies_by_inputs else None for t in tensors]
        signal = self.lrp.signal()
        start = start_of(recording, signal, self.lrp.explained)
        result = iter(propagate(recording, signal, start, tensors, factors, False).relevance)
        return [tuple(finished(next(result)) for _ in group) for group in groups]


def layers_of(layer: Any) -> list[nn.Module]:
    """The layers as a list.

    Raises:
        InputError: for neither a module nor a list of some.
    """
    if isinstance(layer, nn.Module | str):  # a name is refused, with the way out, where layers are looked up
        return [layer]  # type: ignore[list-item]
    if isinstance(layer, list | tuple) and layer:
        return list(layer)
    raise InputError(f"layer: expected a module of the model or a list of them, got {layer!r}")


def join_layers(results: list[Layers]) -> Layers:
    """Results of single examples as one batch."""
    joined = []
    for tensors in zip(*results, strict=True):
        joined.append(tuple(torch.cat(parts, batch_axis(parts[0])) for parts in zip(*tensors, strict=True)))
    return joined


def batch_axis(single: Tensor) -> int:
    """Where a tensor of one example has its batch axis: first, or behind the tokens of a sequence-first model."""
    return next((i for i, size in enumerate(single.shape) if size == 1), 0)
