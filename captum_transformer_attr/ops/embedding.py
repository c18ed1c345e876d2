"""Embedding of token ids.

Integers cannot carry a signal, so every explained id tensor is shadowed by a float handle of the same shape.

The embedding reads ids and handle together, and what reaches the handle on the way back is the relevance of the ids.
How handles follow the ids from the input to the embedding: ``token_ids``.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from captum_transformer_attr.errors import InputError, UnsupportedOperationError
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.leaving import place
from captum_transformer_attr.recording.node import Grads, Node
from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.registry import ON_CONSTANTS, handles
from captum_transformer_attr.recording.tags import HANDLE, tag_of


class Embedding(Node):
    """``F.embedding`` of explained ids: the handle ``(…)`` gets the channel sums of what arrives ``(…, channels)``."""

    label = "embedding"
    y: Tensor

    def __init__(self, ids: Tensor, weight: Tensor, arguments: dict[str, Any]) -> None:
        self.ids, self.weight, self.arguments = ids, weight.detach(), arguments

    def forward(self, handle: Tensor) -> Tensor:  # type: ignore[override]
        y = F.embedding(self.ids, self.weight, **self.arguments).to(handle.dtype)
        self.keep("y", y)
        return y

    def gradient(self, g: Tensor) -> Grads:
        return ((self.y * g).sum(-1),)


@handles("embedding")
def embedding(
    recorder: Recorder,
    input: Tensor,
    weight: Tensor,
    padding_idx: Any = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    *args: Any,
    **kwargs: Any,
) -> Any:
    prepare(recorder, weight, max_norm)
    handle = getattr(input, HANDLE, None)
    if handle is None:
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, *args, **kwargs)
    if input.numel() and not 0 <= int(input.min()) <= int(input.max()) < weight.shape[0]:
        worst = int(input.max()) if int(input.max()) >= weight.shape[0] else int(input.min())
        raise InputError(
            f"inputs: token id {worst} is not in the vocabulary of module '{recorder.path}' (0 to "
            f"{weight.shape[0] - 1})"
        )
    tag = tag_of(handle)
    layout = None
    if tag is not None and tag.layout is not None:
        layout = (*tag.layout, lay.axis(lay.FEATURE, weight.shape[-1]))
    node = Embedding(input, weight, {"padding_idx": padding_idx, "max_norm": max_norm, "norm_type": norm_type})
    return recorder.run(node, handle, layout=layout, weighted=1, role=tags.PLAIN)


def prepare(recorder: Recorder, weight: Any, max_norm: float | None) -> None:
    """With ``max_norm`` torch shortens the rows that are read, in the table itself: a write like any other."""
    if max_norm is not None:
        recorder.writes.prepare(weight)


def of_constant_ids(recorder: Recorder, function: Any, *args: Any, **kwargs: Any) -> Any:
    """``F.embedding`` and ``F.embedding_bag``, which have table and ``max_norm`` in the same places."""
    weight, max_norm = (kwargs.get(name, dict(enumerate(args)).get(i)) for name, i in (("weight", 1), ("max_norm", 3)))
    prepare(recorder, weight, max_norm)
    return function(*args, **kwargs)


ON_CONSTANTS.update(dict.fromkeys(("embedding", "embedding_bag"), of_constant_ids))


@handles("embedding_bag")
def embedding_bag(
    recorder: Recorder,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Rows of a table, pooled: an embedding and a sum or a mean.

    Raises:
        UnsupportedOperationError: for bags of different lengths, maxima and padding.
    """
    if input.ndim != 2 or mode == "max" or padding_idx is not None:
        raise UnsupportedOperationError(
            f"no rule for operation 'embedding_bag' in {place(recorder.path)} with offsets, mode='max' or "
            "padding_idx. Way out: F.embedding and a sum over the tokens of each bag."
        )
    with recorder:
        rows = F.embedding(input, weight, None, max_norm, norm_type)
        if per_sample_weights is not None:
            rows = rows * per_sample_weights[..., None]
        return rows.sum(1) if mode == "sum" else rows.mean(1)
