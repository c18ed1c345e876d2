"""Methods of this package and of Captum as explanation functions of Quantus (Hedström et al., JMLR 2023)."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from captum_transformer_attr.comparison.methods import Method, resolve


class ExplainFunction(Protocol):
    """What Quantus calls."""

    def __call__(
        self, model: nn.Module, inputs: npt.NDArray[Any], targets: npt.NDArray[Any], **options: Any
    ) -> npt.NDArray[np.floating]: ...


def quantus_explain_func(method: str | Method) -> ExplainFunction:
    """A function for the ``explain_func`` argument of Quantus's metrics.

    Quantus hands in and expects NumPy arrays; ``device`` among its options is obeyed, others are left alone.

    Args:
        method: A name with options, as for :func:`~captum_transformer_attr.comparison.compare`, or a method.

    Returns:
        ``(model, inputs, targets, **options) -> attributions`` in the shape of ``inputs``.

    Example:
        >>> quantus.FaithfulnessCorrelation()(model=model, x_batch=x, y_batch=y, a_batch=None,
        ...                                   explain_func=quantus_explain_func("TransformerRelevance"))
    """
    chosen = resolve([method])[0]

    def explain(
        model: nn.Module, inputs: npt.NDArray[Any], targets: npt.NDArray[Any], **options: Any
    ) -> npt.NDArray[np.floating]:
        parameter = next(model.parameters())
        device = options.get("device") or parameter.device
        given = torch.as_tensor(np.asarray(inputs), device=device)
        if given.is_floating_point():
            given = given.to(parameter.dtype)
        wanted = torch.as_tensor(np.asarray(targets), device=device).long()
        return chosen.attribute(model, given, wanted).detach().cpu().numpy()

    return explain
