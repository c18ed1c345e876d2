"""Which axis of a tensor is the batch, which are features, which are tokens, through reshapes and permutations.

Per-example sums (the residual rule, bias accounting) need to know where the examples of a batch are, also inside Swin
windows ``(B * windows, n, C)`` and sequence-first models ``(N, B, C)``. Each axis of a tensor is a tuple of factors
``(label, size)``, outermost first: the axis ``B * windows`` is ``((BATCH, B), (axis, windows))``. A layout that cannot
be followed is ``None``; whoever needs it then explains the examples one by one, so a lost layout costs time and never
correctness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BATCH = "batch"
FEATURE = "feature"
MIXED = "mixed"
STACKED = "stacked"  # trunk and branches of a residual beside each other, see ``ops/stacked.py``
COPIES = "copies"  # of one tensor, each for an expert or a query of its own
NOT_TOKENS = frozenset((MIXED, STACKED, COPIES))

Factor = tuple[str, int]
Axis = tuple[Factor, ...]
Layout = tuple[Axis, ...]


def axis(label: str, size: int) -> Axis:
    """One axis of a single factor; an axis of size 1 has no factor."""
    return ((label, size),) if size != 1 else ()


def initial(name: str, shape: Sequence[int]) -> Layout:
    """Layout of an input: examples first, every other axis is labelled with the input's name and its position."""
    return tuple(axis(BATCH if i == 0 else f"{name}.{i}", size) for i, size in enumerate(shape))


def resized(layout: Layout | None, shape: Sequence[int]) -> Layout | None:
    """Same axes with other sizes (slicing, padding, pooling, concatenation); None if the batch axis itself changed."""
    if layout is None or len(layout) != len(shape):
        return fallback(layout, shape)
    result = []
    for factors, size in zip(layout, shape, strict=True):
        if math.prod(s for _, s in factors) == size:
            result.append(factors)
        elif any(label == BATCH for label, _ in factors):
            return None
        else:
            labels = {label for label, _ in factors}
            result.append(axis(labels.pop() if len(labels) == 1 else MIXED, size))
    return tuple(result)


def fallback(layout: Layout | None, shape: Sequence[int]) -> Layout | None:
    """After an operation that is not understood only a leading batch axis is believed to have stayed where it was."""
    if (
        layout
        and len(shape)
        and layout[0]
        and layout[0][0][0] == BATCH
        and shape[0] == math.prod(s for _, s in layout[0])
    ):
        return (layout[0], *(axis(MIXED, size) for size in shape[1:]))
    return None


def reshaped(layout: Layout | None, shape: Sequence[int]) -> Layout | None:
    """Row-major order is kept, so the flat list of factors is regrouped (and split where needed) into the new axes."""
    if layout is None:
        return None
    factors = [factor for factors in layout for factor in factors][::-1]
    result = []
    for size in shape:
        taken: list[Factor] = []
        while size != 1:
            if not factors:
                return None
            label, available = factors.pop()
            if size % available == 0:
                taken.append((label, available))
                size //= available
            elif available % size == 0:
                taken.append((label, size))
                factors.append((label, available // size))
                size = 1
            else:
                return None
        result.append(tuple(taken))
    return tuple(result) if not factors else None


def permuted(layout: Layout | None, order: Sequence[int]) -> Layout | None:
    """Axes in a new order."""
    return None if layout is None else tuple(layout[i] for i in order)


def broadcast_shape(*shapes: torch.Size) -> torch.Size:
    """Shape that these have together; torch's own function is slow where there is nothing to do."""
    first = shapes[0]
    return first if all(shape == first for shape in shapes) else torch.broadcast_shapes(*shapes)


def broadcast(layouts: Sequence[tuple[Layout | None, Sequence[int]]], shape: Sequence[int]) -> Layout | None:
    """Layout of an elementwise operation over operands with these layouts and shapes."""
    result: list[Axis] = []
    for i in range(-len(shape), 0):
        axes = [
            layout[i] for layout, s in layouts if layout is not None and len(s) >= -i and s[i] == shape[i] and layout[i]
        ]
        axes.sort(key=lambda factors: any(label in (MIXED, COPIES) for label, _ in factors))
        result.append(axes[0] if axes else axis(COPIES, shape[i]))
    return tuple(result) if any(layout is not None for layout, _ in layouts) else None


def dims_of(x: Tensor, dim: Any) -> tuple[int, ...]:
    """Axes of a reduction as non-negative numbers; None or () means all."""
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return tuple(range(x.ndim))
    return tuple(d % x.ndim for d in ((dim,) if isinstance(dim, int) else dim))


def without(layout: Layout | None, dims: Sequence[int], keepdim: bool = False) -> Layout | None:
    """Axes removed (or shrunk to size 1) by a reduction, ``select`` or ``unbind``."""
    if layout is None:
        return None
    dims = [d % len(layout) for d in dims]
    if keepdim:
        return tuple(() if i in dims else factors for i, factors in enumerate(layout))
    return tuple(factors for i, factors in enumerate(layout) if i not in dims)


def indexed(layout: Layout | None, index: object, before: Tensor, after: Tensor) -> Layout | None:
    """Layout of ``before[index]``; advanced indexing is followed as far as it keeps the batch recognisable."""
    if layout is None:
        return None
    items = index_items(index, before.ndim)
    several = sum(isinstance(item, (Tensor, list)) for item in items) > 1
    result: list[Axis] = []
    source, placed = 0, False
    for item in items:
        if item is None:
            result.append(())
            continue
        if isinstance(item, (Tensor, list)):
            positions = item if isinstance(item, Tensor) else torch.tensor(item, device="cpu")
            if positions.dtype == torch.bool or positions.ndim > 1:
                return fallback(layout, after.shape)
            if positions.ndim == 1 and not placed:  # what several lists of positions pick is one axis
                placed = True
                size = after.shape[len(result)] if len(result) < after.ndim else 1
                result.append(picked_axis(layout[source], positions, size, several))
        elif isinstance(item, slice):
            result.append(layout[source])
        source += 1
    if len(result) != after.ndim:
        return fallback(layout, after.shape)
    return resized(tuple(result), after.shape)


def index_items(index: object, ndim: int) -> list[Any]:
    """An index with one item per axis of the tensor that is indexed, a mask aside, and ``None`` for every new axis."""
    items: list[Any] = list(index) if isinstance(index, tuple) else [index]
    masks = [isinstance(i, Tensor) and i.dtype == torch.bool for i in items]
    consumed = 0
    for k, item in enumerate(items):
        if masks[k] and item.ndim == 1 and bool(item.all()):
            items[k] = slice(None)  # a mask that takes everything
        if item is not None and item is not Ellipsis:
            consumed += item.ndim if masks[k] else 1
    position = next((k for k, item in enumerate(items) if item is Ellipsis), len(items))
    items[position : position + 1] = [slice(None)] * (ndim - consumed)
    return items


def picked_axis(factors: Axis, positions: Tensor, size: int, several: bool) -> Axis:
    """The axis that remains of one from which ``positions`` are picked.

    Rows of several examples cannot be told apart any more, but what lies along them can.
    """
    if factors == ((BATCH, size),) and positions.shape == (size,):
        in_order = bool((positions.cpu() == torch.arange(size, device="cpu")).all())
        return factors if in_order else axis(MIXED, size)
    known = len(factors) == 1 and not several and factors[0][0] != BATCH
    return axis(factors[0][0] if known else MIXED, size)


def sample_shape(layout: Layout | None, shape: Sequence[int], batch: int) -> tuple[int, int, int] | None:
    """``(outer, batch, inner)`` such that ``x.reshape(...)`` separates the examples; None if nothing can."""
    total = math.prod(shape)
    if batch == 1:
        return (1, 1, total)
    if layout is None:
        return None
    outer = 1
    for factors in layout:
        for label, size in factors:
            if label == BATCH:
                return (outer, batch, total // (outer * batch)) if size == batch else None
            outer *= size
    return None


def labels(layout: Layout | None) -> list[set[str]]:
    """The set of labels of every axis."""
    return [] if layout is None else [{label for label, _ in factors} for factors in layout]


def features(layout: Layout | None) -> int:
    """Number of features; 0 if the layout was lost."""
    return 0 if layout is None else math.prod(size for factors in layout for label, size in factors if label == FEATURE)


def feature_axes(layout: Layout | None) -> tuple[int, ...]:
    """Positions of the axes that hold features only."""
    return tuple(i for i, found in enumerate(labels(layout)) if found == {FEATURE})


def grid(layout: Layout | None, name: str) -> tuple[int, ...]:
    """Sizes of the token axes that come from the input ``name``, in the input's order of axes."""
    sizes: dict[str, int] = {}
    for factors in layout or ():
        for label, size in factors:
            if label.startswith(f"{name}."):
                sizes[label] = sizes.get(label, 1) * size
    return tuple(sizes[label] for label in sorted(sizes))


def is_map(layout: Layout | None) -> bool:
    """Whether the last two axes hold the same tokens, as queries and keys."""
    rows, columns = last_axes(layout)
    return tokens(rows & columns)


def last_axes(layout: Layout | None) -> tuple[set[str], set[str]]:
    """Labels of the last two axes; empty if the layout was lost."""
    found = labels(layout)
    return (found[-2], found[-1]) if len(found) > 1 else (set(), set())


def tokens(found: set[str]) -> bool:
    """Whether an axis with these labels is known to hold tokens."""
    return bool(found - {BATCH, FEATURE} - NOT_TOKENS)


def is_stacked(layout: Layout | None, dim: int) -> bool:
    """Whether trunk and branches of a residual lie along this axis."""
    return layout is not None and any(label == STACKED for label, _ in layout[dim])


def shape(layout: Layout) -> tuple[int, ...]:
    """Sizes of the axes."""
    return tuple(math.prod(size for _, size in factors) for factors in layout)


def aligned(values: Tensor, source: Layout, target: Layout) -> Tensor | None:
    """Per-token values with axes ``source``, shaped to broadcast against a tensor with axes ``target``.

    They are means over the feature factors of ``source`` and over mixed ones that ``target`` lacks (repeated heads).

    None if the two do not hold the same tokens in a way that can be followed.
    """
    factors = [factor for factors in source for factor in factors]
    values = values.reshape([size for _, size in factors])
    asked = {factor for axis_factors in target for factor in axis_factors}
    features = [
        i
        for i, factor in enumerate(factors)
        if factor[0] == FEATURE or (factor[0] in NOT_TOKENS and factor not in asked)
    ]
    if features:
        values = values.mean(features)
    have = [factor for i, factor in enumerate(factors) if i not in features]
    flat = [factor for axis_factors in target for factor in axis_factors if factor[0] != FEATURE]
    if len(set(flat)) != len(flat) or sorted(flat) != sorted(have):
        return None
    values = values.permute([have.index(factor) for factor in flat])
    # Features have size 1, except on an axis that they share with tokens (heads beside the batch): each gets the value.
    alone = [1 if label == FEATURE else size for factors in target for label, size in factors]
    whole = [
        size if label != FEATURE or any(other != FEATURE for other, _ in factors) else 1
        for factors in target
        for label, size in factors
    ]
    merged = [n if any(label != FEATURE for label, _ in f) else 1 for f, n in zip(target, shape(target), strict=True)]
    return values.reshape(alone).expand(whole).reshape(merged)
