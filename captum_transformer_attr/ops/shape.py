"""Operations that only move values: which they are, and what they do to the layout.

torch's own backward is right for every signal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.ops.stacked import as_parts, make_residual
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.node import LocalNode
from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.registry import handles, infers
from captum_transformer_attr.recording.tags import tag_of


def layout_of(x: Tensor) -> lay.Layout | None:
    tag = tag_of(x)
    return tag.layout if tag else None


@infers(
    "view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel", "unsqueeze", "squeeze", "_unsafe_view"
)
def regrouped(out: Tensor, x: Tensor, *_: Any, **__: Any) -> lay.Layout | None:
    return lay.reshaped(layout_of(x), out.shape)


def reorders(name: str) -> None:
    function = getattr(Tensor, name)

    @infers(name)
    def infer(out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> lay.Layout | None:
        probe = torch.empty([i + 2 for i in range(x.ndim)], device="meta")
        moved = getattr(probe, name) if name in ("T", "mT", "H", "mH") else function(probe, *args, **kwargs)
        return lay.permuted(layout_of(x), [size - 2 for size in moved.shape])


for _name in ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT", "adjoint"):
    reorders(_name)


@infers("view_as_complex")
def paired(out: Tensor, x: Tensor) -> lay.Layout | None:
    return lay.without(layout_of(x), [-1])


@infers("view_as_real")
def unpaired(out: Tensor, x: Tensor) -> lay.Layout | None:
    layout = layout_of(x)
    return None if layout is None else (*layout, lay.axis(lay.FEATURE, 2))


@infers("unbind")
def unbound(out: Tensor, x: Tensor, dim: int = 0) -> lay.Layout | None:
    return lay.without(layout_of(x), [dim])


@infers("select")
def selected(out: Tensor, x: Tensor, dim: int, index: int) -> lay.Layout | None:
    return lay.without(layout_of(x), [dim])


@infers("__getitem__")
def indexed(out: Tensor, x: Tensor, index: Any) -> lay.Layout | None:
    return lay.indexed(layout_of(x), index, x, out)


@infers("expand", "expand_as", "broadcast_to")
def expanded(out: Tensor, x: Tensor, *_: Any, **__: Any) -> lay.Layout | None:
    return lay.broadcast([(layout_of(x), x.shape)], out.shape)


@infers("repeat", "tile")
def copied(out: Tensor, x: Tensor, *_: Any, **__: Any) -> lay.Layout | None:
    """Axes in front are new; the others hold one copy after another."""
    layout = layout_of(x)
    if layout is None:
        return None
    before = [()] * (out.ndim - x.ndim) + list(layout)
    sizes = [1] * (out.ndim - x.ndim) + list(x.shape)
    return tuple((*lay.axis(lay.COPIES, n // max(m, 1)), *f) for f, m, n in zip(before, sizes, out.shape, strict=True))


@infers("repeat_interleave")
def repeated(out: Tensor, x: Tensor, repeats: Any, dim: int | None = None, **_: Any) -> lay.Layout | None:
    layout = layout_of(x)
    if layout is None or dim is None or not isinstance(repeats, int):
        return None
    return tuple(
        (*factors, *lay.axis(lay.MIXED, repeats)) if i == dim % x.ndim else factors for i, factors in enumerate(layout)
    )


@infers("__iter__")
def iterated(out: Tensor, x: Tensor) -> lay.Layout | None:
    return lay.without(layout_of(x), [0])


@infers("unfold")
def unfolded(out: Tensor, x: Tensor, *_: Any, **__: Any) -> lay.Layout | None:
    return lay.fallback(layout_of(x), out.shape)


SAME_AXES = """pixel_shuffle pixel_unshuffle masked_select gather index_select roll flip pad chunk split
    split_with_sizes tensor_split narrow contiguous clone to float half double bfloat16 type_as type masked_fill
    cuda cpu dropout max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d take_along_dim masked_scatter copy_""".split()


@infers(*SAME_AXES)
def same_axes(out: Tensor, x: Any, *_: Any, **__: Any) -> lay.Layout | None:
    return lay.resized(layout_of(x), out.shape) if isinstance(x, Tensor) else None


@infers("__setitem__")
def written(out: Tensor, x: Tensor, index: Any, value: Any) -> lay.Layout | None:
    """A constant buffer gets the layout of what is written into slices of it."""
    dim = place_in_stack(out, index, value)
    if dim is not None:
        return stacked_by_writes(out, x, value, dim)
    slices = all(isinstance(i, slice) or i is Ellipsis for i in (index if isinstance(index, tuple) else (index,)))
    fills = tag_of(x) is None and isinstance(value, Tensor) and value.ndim == out.ndim and slices
    return lay.resized(layout_of(value if fills else x), out.shape)


def place_in_stack(out: Tensor, index: Any, value: Any) -> int | None:
    """The axis of which a write fills one place, as ``stack`` would; None for other writes."""
    items = lay.index_items(index, out.ndim)
    places = [i for i, item in enumerate(items) if isinstance(item, int) and not isinstance(item, bool)]
    whole = all(item == slice(None) for i, item in enumerate(items) if i not in places and not isinstance(item, Tensor))
    plain = len(items) == out.ndim and not any(item is None or isinstance(item, (Tensor, list)) for item in items)
    same = isinstance(value, Tensor) and tag_of(value) is not None and len(places) == 1
    return places[0] if same and plain and whole and value.shape == out.select(places[0], 0).shape else None


def stacked_by_writes(out: Tensor, x: Tensor, value: Tensor, dim: int) -> lay.Layout | None:
    """Layout of a buffer into which one part after another is written: a residual's, if their attentions differ."""
    known, before = layout_of(value), tag_of(x)
    if before is None:
        return None if known is None else (*known[:dim], lay.axis(lay.MIXED, out.shape[dim]), *known[dim:])
    if before.layout is None or not set(before.layout[dim]) <= {(lay.MIXED, out.shape[dim])}:
        return lay.resized(before.layout, out.shape)
    new = tag_of(value)
    label = lay.STACKED if new is not None and new.attention != before.attention else lay.MIXED
    return (*before.layout[:dim], lay.axis(label, out.shape[dim]), *before.layout[dim + 1 :])


class Join(LocalNode):
    """Live and constant values brought together (``cat``, ``stack``, ``where``, padding).

    What does not return to a live input arrived at the constants.
    """

    label = "joining with constants"
    mark: Callable[..., Tensor]

    def live_positions(self) -> Tensor:
        """Boolean tensor of the output's shape: True where the value came from a live input."""
        return self.mark(*(torch.ones_like(leaf) for leaf in self.leaves)) == 1


def join(recorder: Recorder, function: Any, pieces: list[Tensor], layout: Any, **tag: Any) -> Tensor:
    """Record ``function(*pieces)``; constant pieces are parameters such as class tokens."""
    live = [t for t in pieces if t.requires_grad]
    node = Join()

    flags = [t.requires_grad for t in pieces]

    def filled(constants: list[Tensor]) -> Callable[..., Tensor]:
        def call(*values: Tensor) -> Tensor:
            given = iter(values)
            return function([next(given) if alive else t for t, alive in zip(constants, flags, strict=True)])  # type: ignore[no-any-return]

        return call

    node.function = filled([t.detach() for t in pieces])
    node.mark = filled([torch.zeros_like(t) for t in pieces])
    roles = {t.role for t in map(tag_of, live) if t}
    return recorder.run(node, *live, layout=layout, role=roles.pop() if len(roles) == 1 else tags.PLAIN, **tag)


@handles("cat", "concat", "concatenate")
def cat(recorder: Recorder, tensors: Any, dim: int = 0, *, axis: int | None = None, out: Any = None) -> Any:
    dim = dim if axis is None else axis
    pieces = [t for t in tensors if t.numel() or t.ndim > 1]
    result = torch.cat([t.detach() for t in pieces], dim)
    where = dim % result.ndim
    layouts = [(layout_of(t), t.shape) for t in pieces if t.requires_grad and layout_of(t) is not None]
    layout = None
    if layouts:
        axes = list(layouts[0][0] or ())
        labels = {label for known, _ in layouts for label, _ in (known or ())[where]}
        if lay.BATCH not in labels:
            axes[where] = lay.axis(labels.pop() if len(labels) == 1 else lay.MIXED, result.shape[where])
            layout = tuple(axes)
    parts = stacked_by_cat(recorder, pieces, where)
    if layout is not None and parts and make_residual(recorder, pieces):
        layout = (*layout[:where], lay.axis(lay.STACKED, len(parts)), *layout[where + 1 :])
    return join(recorder, lambda values: torch.cat(values, dim), pieces, layout, parts=parts, parts_dim=where)


def joins(dim: int, least: int, *names: str) -> None:
    """Register another name of ``cat`` along an axis, for tensors of at least this many."""

    @handles(*names)
    def handler(recorder: Recorder, tensors: Any) -> Any:
        if any(t.ndim < least for t in tensors):
            return NotImplemented
        with recorder:
            return torch.cat(tuple(tensors), dim)


joins(0, 2, "vstack", "row_stack")
joins(1, 2, "hstack", "column_stack")
joins(2, 3, "dstack")


def stacked_by_cat(recorder: Recorder, pieces: list[Tensor], dim: int) -> tuple[tags.Part, ...]:
    """The parts that ``cat`` joins along a new axis, as ``stack`` does: their tokens lie along other axes."""
    if any(t.shape[dim] != 1 for t in pieces) or not all(
        any(map(lay.tokens, lay.labels(layout_of(t)))) for t in pieces if t.requires_grad
    ):
        return ()
    with recorder:
        return as_parts([t.squeeze(dim) for t in pieces])


@handles("stack")
def stack(recorder: Recorder, tensors: Any, dim: int = 0) -> Any:
    pieces = list(tensors)
    known = next((layout_of(t) for t in pieces if t.requires_grad), None)
    where = dim % (pieces[0].ndim + 1)
    label = lay.STACKED if make_residual(recorder, pieces) else lay.MIXED
    layout = None if known is None else (*known[:where], lay.axis(label, len(pieces)), *known[where:])
    parts = as_parts(pieces)
    return join(recorder, lambda values: torch.stack(values, where), pieces, layout, parts=parts, parts_dim=where)


@handles("where")
def where(recorder: Recorder, condition: Tensor, input: Any = None, other: Any = None) -> Any:
    if condition.dtype != torch.bool:  # the method form: x.where(condition, other)
        condition, input = input, condition
    pieces = [
        t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=o.dtype, device=condition.device)
        for t, o in ((input, other), (other, input))
    ]
    shape = lay.broadcast_shape(condition.shape, *(t.shape for t in pieces))
    layout = lay.broadcast([(layout_of(t), t.shape) for t in pieces], shape)
    return join(recorder, lambda values: torch.where(condition, *values), pieces, layout)


@handles("pad")
def pad(recorder: Recorder, input: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    if all(p == 0 for p in pad):
        return input
    result = torch.nn.functional.pad(input.detach(), pad, mode, value)
    return join(
        recorder,
        lambda values: torch.nn.functional.pad(values[0], pad, mode, value),
        [input],
        lay.resized(layout_of(input), result.shape),
    )


@handles("dropout", "alpha_dropout", "feature_dropout", "dropout1d", "dropout2d", "dropout3d")
def dropout(recorder: Recorder, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return NotImplemented if training and p > 0 else input
