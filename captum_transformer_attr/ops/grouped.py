"""Grouped matrix products: the experts of a mixture, each on its own rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.ops.linear import LinearMap, after_linear, live_weight
from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.registry import handles


class GroupedProduct(LinearMap):
    """Rows ``(S, K)``, sorted by expert, times their expert's weight ``(E, K, N)``; ``ends`` are the experts' last
    rows.

    Rows behind the last end belong to no expert and give zeros.
    """

    label = "grouped matrix product"

    def __init__(self, weight: Tensor, ends: list[int]) -> None:
        super().__init__(weight)
        self.ends = ends

    def per_expert(self, rows: Tensor, weight: Tensor) -> Tensor:
        starts = [0, *self.ends[:-1]]
        parts = [rows[a:b] @ w for a, b, w in zip(starts, self.ends, weight, strict=True)]
        parts.append(rows.new_zeros(rows.shape[0] - self.ends[-1], weight.shape[-1]))
        return torch.cat(parts)

    def map(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.per_expert(x, weight)

    def pullback(self, s: Tensor, weight: Tensor) -> Tensor:
        return self.per_expert(s, weight.mT)

    def spread(self, r: Tensor) -> Tensor:
        return (r.sum(-1, keepdim=True) / self.x.shape[-1]).expand_as(self.x)


@handles("grouped_mm", "_grouped_mm")
def grouped_product(recorder: Recorder, mat_a: Tensor, mat_b: Tensor, *, offs: Any = None, **options: Any) -> Any:
    if mat_a.ndim != 2 or mat_b.ndim != 3 or offs is None or live_weight(mat_b, options.get("bias")):
        return NotImplemented
    if any(value is not None for value in options.values()):
        return NotImplemented  # a bias or another output dtype: not used by any known model
    return recorder.run(GroupedProduct(mat_b, offs.tolist()), mat_a, **after_linear(mat_a, None))
