"""NeuronTransformerLRP: relevance of the input for one neuron, in Captum's neuron family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from captum_transformer_attr.captum_compat import GradientAttribution, NeuronAttribution, log_usage, select_neuron
from captum_transformer_attr.errors import TargetError
from captum_transformer_attr.methods.base import finished, parsed
from captum_transformer_attr.methods.transformer_lrp import TransformerLRP, join_explained
from captum_transformer_attr.recording.session import Recording
from captum_transformer_attr.recording.tap import Tap
from captum_transformer_attr.rules.linear_rules import Composite

NeuronSelector = int | tuple[int | slice, ...] | Callable[..., Any]


class NeuronTransformerLRP(NeuronAttribution, GradientAttribution):  # type: ignore[misc]
    """Relevance of the input for a neuron of a layer, under the rules of ``TransformerLRP``: the neuron takes the place
    of the logit.

    Args:
        model: any module, or a function around one; used as it is, in evaluation mode, and left as found.
        layer: a module of the model.
        rules, composite: see ``TransformerLRP``.
        device_ids: as in Captum's neuron methods; unused, the model runs on the devices it is on.

    Raises:
        InputError: for an unknown option.

    Example:
        >>> neuron = NeuronTransformerLRP(model, model.blocks[3].mlp, rules="cp")
        >>> relevance = neuron.attribute(pixels, (0, 7))  # for channel 7 of token 0
    """

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        layer: nn.Module,
        rules: str = "deep_taylor",
        composite: str | Composite | None = None,
        device_ids: list[int] | None = None,
    ) -> None:
        NeuronAttribution.__init__(self, model, layer, device_ids)
        GradientAttribution.__init__(self, model)
        self.lrp = NeuronLRP(model, rules, composite)

    @property
    def multiplies_by_inputs(self) -> bool:
        """Relevance is a share of the neuron's value, not a slope."""
        return True

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Any,
        neuron_selector: NeuronSelector,
        additional_forward_args: Any = None,
        attribute_to_neuron_input: bool = False,
    ) -> Any:
        """Relevance in the inputs' shape.

        Args:
            inputs: a Tensor, a tuple of Tensors (positional arguments) or a mapping (keyword arguments); floats and
                token ids alike.
            neuron_selector: as in Captum: index of the neuron without the batch axis (slices add up), or a function of
                the layer's tensors.
            additional_forward_args: further positional arguments of the model.
            attribute_to_neuron_input: a neuron of what enters the layer instead of what leaves it.

        Returns:
            Tensor, tuple or dict as ``inputs``, each of its input's shape.

        Raises:
            InputError: if the layer is not part of the model, or saw nothing that depends on the inputs.
        """
        given = parsed(inputs, additional_forward_args)
        lrp = copy.copy(self.lrp)  # of this call alone: threads may share the object
        lrp.forward_func = self.forward_func
        lrp.tap = Tap(self.forward_func, [self.layer], attribute_to_neuron_input)
        explained = lrp.explain(given, neuron_selector, lambda recording: lrp.score(recording, False), join_explained)
        return given.pack({name: finished(r, given.values[name]) for name, r in explained.relevance.items()})


class NeuronLRP(TransformerLRP):
    """``TransformerLRP`` whose target selects from a captured layer instead of the model's output."""

    def choose(self, recording: Recording, target: Any) -> None:
        assert self.tap is not None
        tensors = tuple(self.tap.of(0))
        # Selectors may compute: their operations are recorded like the model's.
        with recording.recorder, torch.enable_grad():
            try:
                recording.output = select_neuron(tensors, target)
            except (AssertionError, IndexError, TypeError, ValueError) as error:
                if callable(target):
                    raise
                shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
                raise TargetError(f"neuron_selector={target!r} does not fit the layer's {shapes}: {error}") from error
        recording.select(None)
