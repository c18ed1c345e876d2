"""What we use of Captum beyond its documented interface, in one place: the base classes and its reading of targets."""

from __future__ import annotations

from captum._utils.common import _select_targets as select_targets
from captum._utils.common import _verify_select_neuron as select_neuron
from captum._utils.gradient import _run_forward as run_forward
from captum.attr._utils.attribution import GradientAttribution, NeuronAttribution
from captum.log import log_usage

__all__ = [
    "GradientAttribution",
    "NeuronAttribution",
    "log_usage",
    "run_forward",
    "select_neuron",
    "select_targets",
]
