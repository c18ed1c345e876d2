"""What the model does with token ids before it embeds them.

The float handles follow, or the use is marked and refused where it would matter.

Ids that are moved (a decoder's shifted input, padding, joining) take their handle along; so do ids that are computed
elementwise from ids (hash buckets, offsets), because position and token stay the same. A table indexed by ids is an
embedding. Comparisons make masks, which say nothing of their own. Every other function of ids leaves the graph: its
floats are marked as cut, its integers as not to be embedded, whether it gives one tensor or several.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_transformer_attr.errors import UnsupportedOperationError
from captum_transformer_attr.recording.constants import tensor_written
from captum_transformer_attr.recording.leaving import mark_unfollowed, place, results_of
from captum_transformer_attr.recording.names import base_name, writes
from captum_transformer_attr.recording.nested import tensors_in
from captum_transformer_attr.recording.node import Grads, Node
from captum_transformer_attr.recording.registry import HANDLERS
from captum_transformer_attr.recording.tags import ATTRIBUTE, CUT, HANDLE, IDS, Position, tag_of
from captum_transformer_attr.recording.undispatched import undispatched

if TYPE_CHECKING:
    from captum_transformer_attr.recording.recorder import Recorder

MOVES = frozenset(
    """view reshape flatten unflatten contiguous clone permute transpose t T mT squeeze unsqueeze expand expand_as
    repeat repeat_interleave __getitem__ narrow select chunk split unbind cat concat concatenate stack roll flip
    index_select gather pad masked_fill where view_as reshape_as detach data __setitem__ masked_fill_ fill_ copy_
    take_along_dim movedim swapaxes split_with_sizes tensor_split""".split()
)
ONE_HOT = "_captum_transformer_attr_one_hot"  # the ids behind one-hot integers
ONE_HOT_CASTS = frozenset("to float double half bfloat16 type type_as".split())
CASTS = frozenset("to long int short type type_as cuda cpu".split())
COMPUTES = frozenset(
    """add sub rsub mul remainder mod fmod floordiv floor_divide div abs neg clamp clip clamp_min clamp_max bitwise_and
    and bitwise_or or bitwise_xor xor""".split()
)

POSITIONS = frozenset("argmax argmin argsort nonzero count_nonzero".split())
PICKS = frozenset("max min sort topk kthvalue mode median cummax cummin".split())  # values and their positions


class Combined(Node):
    """Handle of ids that were computed from two (an n-gram's hash): one embedding belongs to both.

    An id's relevance is the sum over its embeddings, so they share what arrives; ids that were added to themselves get
    it once.
    """

    label = "ids computed from ids"

    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        return torch.zeros_like(a)

    def gradient(self, g: Tensor) -> Grads:
        return g / 2, g / 2


def with_handles(recorder: Recorder, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run a function whose arguments include explained ids, and let their handles follow."""
    if name in ("embedding", "embedding_bag"):
        return HANDLERS[name](recorder, *args, **kwargs)
    table = table_lookup(recorder, name, args)
    if table is not None:
        return table
    if name in MOVES:
        return moved(recorder, func, name, args, kwargs)
    if name == "one_hot":
        return one_hot(recorder, func, *args, **kwargs)
    if name in ONE_HOT_CASTS and hasattr(args[0], ONE_HOT):
        result = func(*args, **kwargs)
        return as_embedding(recorder, args[0], result) if result.is_floating_point() else result
    if name not in HANDLERS and (copy := undispatched(func)) is not None:
        with recorder:
            return copy(*args, **kwargs)
    computes = name in CASTS or base_name(name).removeprefix("r") in COMPUTES or base_name(name) in COMPUTES
    if not computes:
        return unfollowed(recorder, func, name, args, kwargs)
    result = func(*args, **kwargs)
    if result.is_floating_point():
        setattr(result, CUT, recorder.path)
    elif result.dtype != torch.bool:
        setattr(result, HANDLE, combined(recorder, (*args, *kwargs.values()), result.shape))
    return result


def unfollowed(recorder: Recorder, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run a function of ids that no handle follows, and mark what it gives, or what it writes into."""
    result = func(*args, **kwargs)
    if writes(name):
        recorder.writes.marked.append(args[0])
    for i, out in enumerate(results_of(args[0] if writes(name) else result)):
        is_position = name in POSITIONS or (name in PICKS and i == 1)
        mark_unfollowed(out, Position(recorder.path) if is_position else recorder.path)
    return result


def one_hot(recorder: Recorder, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """One-hot integers remember their ids: cast to floats they are an embedding by the unit matrix."""
    result: Tensor = func(tensor, *args, **kwargs)
    setattr(result, ONE_HOT, tensor)
    setattr(result, HANDLE, getattr(tensor, HANDLE)[..., None].expand(result.shape))
    return result


def as_embedding(recorder: Recorder, one_hot: Tensor, floats: Tensor) -> Tensor:
    """The floats that one-hot integers became, recorded as rows of the unit matrix."""
    table = torch.eye(floats.shape[-1], dtype=floats.dtype, device=floats.device)
    result: Tensor = HANDLERS["embedding"](recorder, getattr(one_hot, ONE_HOT), table)
    return result


def combined(recorder: Recorder, values: tuple[Any, ...], shape: torch.Size) -> Tensor:
    """Handle of ids computed elementwise from ids."""
    handles: list[Tensor] = [getattr(v, HANDLE) for v in values if hasattr(v, HANDLE)]
    with recorder:
        first, *others = (handle.expand(shape) for handle in handles)
    for other in others:
        known = tag_of(first)
        first = recorder.run(Combined(), first, other, layout=known.layout if known else None, role=IDS)
    return first


def table_lookup(recorder: Recorder, name: str, args: Any) -> Tensor | None:
    """``table[ids]`` and ``table.index_select(0, ids)`` of a constant.

    An embedding if the table holds floats, other ids if it holds integers.
    """
    if name == "__getitem__":
        index, whole = args[1], True
    elif name == "index_select":
        index, whole = args[2], args[1] == 0
    else:
        return None
    if hasattr(args[0], HANDLE) or not isinstance(index, Tensor) or not hasattr(index, HANDLE):
        return None
    if args[0].is_floating_point() and args[0].ndim == 2 and whole:
        result: Tensor = HANDLERS["embedding"](recorder, index, args[0])
        return result
    result = args[0][index] if name == "__getitem__" else args[0].index_select(args[1], index)
    if not result.is_floating_point() and result.shape == index.shape:
        setattr(result, HANDLE, getattr(index, HANDLE))
    else:
        mark_unfollowed(result, recorder.path)
    return result


def moved(recorder: Recorder, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Repeat on the handles what moves the ids; constants that take their places have the handle 0.

    Ids that are only positions (in a table that is gathered from, in a buffer that is written into) are not moved.
    """
    handles, options = on_handles(recorder, name, args, kwargs)
    if not any(t.requires_grad for t in tensors_in((*handles, *options.values()))):
        return unfollowed(recorder, func, name, args, kwargs)
    result = func(*args, **kwargs)
    if writes(name):
        with recorder:
            func(rewritten(recorder, args[0]), *handles[1:], **options)
        return result
    with recorder:
        followed = func(*handles, **options)
    outs = zip(result, followed, strict=True) if isinstance(result, (tuple, list)) else [(result, followed)]
    for out, handle in outs:
        if handle.requires_grad:
            setattr(out, HANDLE, handle)
    return result


def rewritten(recorder: Recorder, ids: Tensor) -> Tensor:
    """The new handle of ids that are written into; what they are a view of gets one as well.

    Raises:
        UnsupportedOperationError: if they are a view of ids that do not lie in order.
    """
    whole = tensor_written(ids)
    handle: Tensor = handle_of(recorder, whole).clone()
    setattr(whole, HANDLE, handle)
    if whole is ids:
        return handle
    if not whole.is_contiguous():
        raise UnsupportedOperationError(
            f"{place(recorder.path)} writes into a view of token ids that do not lie in order: no handle can follow. "
            "Way out: torch.where or torch.cat in the place of the write, or contiguous ids."
        )
    tag = tag_of(getattr(ids, HANDLE, handle))
    part = handle.contiguous().as_strided(ids.shape, ids.stride(), ids.storage_offset() - whole.storage_offset())
    if part.requires_grad:
        layout = tag.layout if tag is not None and hasattr(ids, HANDLE) else None
        setattr(part, ATTRIBUTE, replace(tag_of(part), layout=layout))  # type: ignore[type-var]
    setattr(ids, HANDLE, part)
    return part


def on_handles(recorder: Recorder, name: str, args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a function that moves ids with handles in the place of ids, 0 in that of other values.

    The values that are moved stand first; what follows are positions, except where values are put in.
    """
    if name == "where":
        return where_on_handles(recorder, *args, **kwargs), {}
    options = {key: handle_of(recorder, value) if key == "input" else value for key, value in kwargs.items()}
    rest = list(args[1:])
    if name in ("masked_fill", "masked_fill_"):
        rest = [*rest[:1], *([0.0] if len(rest) > 1 else [])]
        options = {key: 0.0 if key == "value" else value for key, value in options.items()}
    elif name == "fill_":
        rest, options = [0.0], {}
    elif name == "__setitem__":
        rest = [rest[0], handle_of(recorder, rest[1]) if isinstance(rest[1], Tensor) else 0.0]
    elif name == "copy_":
        rest = [handle_of(recorder, rest[0])]
    elif name == "pad":
        options.pop("value", None)
    if not args:
        return [], options
    several = isinstance(args[0], (list, tuple))
    first = [handle_of(recorder, t) for t in args[0]] if several else handle_of(recorder, args[0])
    return [first, *rest], options


def where_on_handles(recorder: Recorder, condition: Tensor, input: Any = None, other: Any = None) -> list[Any]:
    """The arguments of ``where`` as a function; as a method it has the condition in second place."""
    if input is None:
        return [condition]
    if condition.dtype != torch.bool:
        condition, input = input, condition
    return [condition, *(handle_of(recorder, a) if isinstance(a, Tensor) else 0.0 for a in (input, other))]


def handle_of(recorder: Recorder, value: Any) -> Any:
    """The handle of ids, zeros for other tensors; anything else is itself."""
    if not isinstance(value, Tensor):
        return value
    handle = getattr(value, HANDLE, None)
    if handle is None:
        handle = torch.zeros(value.shape, dtype=recorder.handle_dtype, device=value.device)
    return handle
