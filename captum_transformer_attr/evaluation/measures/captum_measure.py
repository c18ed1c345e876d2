"""Captum's own metrics as a measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_transformer_attr.evaluation.batch import Batch
from captum_transformer_attr.evaluation.measures.measure import Column, Explain, Forward, OneClassMeasure
from captum_transformer_attr.metrics import Accumulator, infidelity_and_sensitivity
from captum_transformer_attr.metrics.accumulator import Bootstrap


@dataclass(frozen=True)
class CaptumMeasure(OneClassMeasure):
    """Captum's infidelity (with its optimal scaling) and maximum sensitivity; images only.

    Costs ten attributions and twenty forwards per example.
    """

    name: str = "captum"
    role: str = "predicted"

    def accumulator(self, forward: Forward) -> CaptumAccumulator:
        return CaptumAccumulator(forward)

    def update(self, accumulator: CaptumAccumulator, batch: Batch, maps: Mapping[str, Any], explain: Explain) -> None:
        accumulator.update(explain, batch.inputs, maps[self.role], batch.targets[self.role])

    def columns(self, accumulator: CaptumAccumulator, seed: int) -> list[Column]:
        result = accumulator.compute(seed=seed)
        return [
            Column("infidelity", "lower", result["infidelity"]),
            Column("max. sensitivity", "lower", result["sensitivity_max"]),
        ]


class CaptumAccumulator(Accumulator):
    """Infidelity and sensitivity over a stream of batches."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.forward = forward

    def update(self, explain: Explain, inputs: Any, attributions: Any, target: Tensor) -> None:
        """Adds a batch."""
        bound = _Bound(self.forward, explain)
        result = infidelity_and_sensitivity(bound, inputs, target, attributions=attributions)
        self._add(**result._asdict())

    def _summary(self, estimate: Bootstrap) -> dict[str, Any]:
        return {name: estimate(self._column(name))[0] for name in self._columns}


@dataclass(frozen=True)
class _Bound:
    """A method on a model in the form of a Captum attribution object."""

    forward_func: Forward
    explain: Explain

    def attribute(self, inputs: Any, target: Any = None, additional_forward_args: Any = None) -> Any:
        # sensitivity_max hands a single input over as a tuple of one.
        single = isinstance(inputs, tuple) and len(inputs) == 1
        return (self.explain(inputs[0], target),) if single else self.explain(inputs, target)
