"""Token ids: integers cannot carry a signal, so every explained id tensor is shadowed by a float handle of the same shape.

View-like operations on the ids (shifting a decoder's input, cutting, joining) are repeated on the handle; the embedding reads ids and handle
together, and what reaches the handle on the way back is the relevance of the ids.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.node import Grads, Node
from captum_transformer_attr.recording.recorder import HANDLE, HANDLERS, LAYOUTS, Recorder, base_name, handles, is_in_place, undispatched
from captum_transformer_attr.recording.tags import tag_of


class Embedding(Node):
    """``F.embedding`` of explained ids: the handle ``(…)`` gets the channel sums of what reaches the embedding ``(…, channels)``."""

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


# Operations that only move ids (or replace some by constants).
MOVES = frozenset(
    """view reshape flatten unflatten contiguous clone to long int permute transpose t T mT squeeze unsqueeze expand expand_as repeat repeat_interleave
    __getitem__ narrow select chunk split unbind cat concat concatenate stack roll flip index_select gather pad masked_fill where view_as
    reshape_as type type_as cuda cpu detach data __setitem__ masked_fill_ fill_ copy_ take_along_dim movedim swapaxes split_with_sizes tensor_split""".split()
)


def with_handles(recorder: Recorder, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run a function whose arguments include explained ids, and let their handles follow."""
    if name == "embedding":
        return HANDLERS["embedding"](recorder, *args, **kwargs)
    if name in HANDLERS or name == "embedding_bag":
        return func(*args, **kwargs)
    if name not in MOVES and (copy := undispatched(func)) is not None:
        with recorder:
            return copy(*args, **kwargs)
    writes = is_in_place(name) or name == "__setitem__"
    result = func(*args, **kwargs)
    if name not in MOVES:
        return result

    def shadow(value: Any, position: int = 1) -> Any:
        if isinstance(value, Tensor):
            return getattr(value, HANDLE, torch.zeros(value.shape, dtype=recorder.handle_dtype, device=value.device) if position == 0 else value)
        return value

    if name in ("to", "long", "int", "type", "type_as", "cuda", "cpu", "detach", "data"):
        setattr(result, HANDLE, getattr(args[0], HANDLE))
        return result
    first = [shadow(t, 0) for t in args[0]] if args and isinstance(args[0], (list, tuple)) else shadow(args[0], 0) if args else None
    rest = [shadow(a) for a in args[1:]]
    if name in ("where",):
        first, rest = args[0], [shadow(a, 0) if isinstance(a, Tensor) else 0 * a for a in args[1:]]
    elif name in ("masked_fill", "masked_fill_", "fill_"):
        rest = [*args[1:-1], 0]
    elif name == "__setitem__":
        value = args[2]
        rest = [args[1], getattr(value, HANDLE, torch.zeros(value.shape)) if isinstance(value, Tensor) else 0]
    elif name == "copy_":
        rest = [getattr(args[1], HANDLE, 0)]
    if writes:
        first = first.clone()  # type: ignore[union-attr]
    with recorder:
        moved = func(*([first, *rest] if args else []), **kwargs)
    if writes:
        target = args[0]
        setattr(target, HANDLE, first)
        return result
    outs = zip(result, moved, strict=True) if isinstance(result, (tuple, list)) else [(result, moved)]
    for out, handle in outs:
        if handle.requires_grad:
            setattr(out, HANDLE, handle)
    return result


@handles("embedding")
def embedding(recorder: Recorder, input: Tensor, weight: Tensor, padding_idx: Any = None, *args: Any, **kwargs: Any) -> Any:
    handle = getattr(input, HANDLE, None)
    if handle is None:
        return F.embedding(input, weight, padding_idx, *args, **kwargs)
    if input.numel() and not 0 <= int(input.min()) <= int(input.max()) < weight.shape[0]:
        worst = int(input.max()) if int(input.max()) >= weight.shape[0] else int(input.min())
        raise InputError(f"inputs: token id {worst} is not in the vocabulary of module '{recorder.path}' (0 to {weight.shape[0] - 1})")
    tag = tag_of(handle)
    layout = None
    if tag is not None and tag.layout is not None:
        layout = (*tag.layout, lay.axis(lay.FEATURE, weight.shape[-1]))
    node = Embedding(input, weight, {"padding_idx": padding_idx})
    return recorder.run(node, handle, layout=layout, weighted=1, role=tags.PLAIN)


__all__ = ["Embedding", "with_handles", "LAYOUTS", "base_name"]
