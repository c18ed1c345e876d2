"""Where on an input's axis the cells of a token grid lie, and which elements no token reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_transformer_attr.errors import UnsupportedOperationError
from captum_transformer_attr.flow.token_flow import TABLE
from captum_transformer_attr.ops.bilinear import unbroadcast
from captum_transformer_attr.ops.pooling import Pool
from captum_transformer_attr.ops.residual import Sum
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording.node import Grads, Node
from captum_transformer_attr.recording.session import Recording
from captum_transformer_attr.recording.signal import Signal


@dataclass(frozen=True)
class Placement:
    """Cells of a grid along one axis of an input: cell i begins at element ``start + i * step``.

    ``read``: booleans per element; None where all are read. What a patch size leaves over at the end is not.
    """

    start: float
    step: float
    read: Tensor | None = None

    def centres(self, size: int, device: torch.device) -> Tensor:
        """Where the elements lie, in cells: i is the centre of cell i."""
        return (torch.arange(size, dtype=torch.float64, device=device) + 0.5 - self.start) / self.step - 0.5

    def cells(self, size: int, count: int, device: torch.device) -> Tensor:
        """The cell of every element, the outermost ones beyond the grid."""
        return (self.centres(size, device) + 0.5).floor().clamp(0, count - 1).long()

    def spread(self, scores: Tensor, dim: int, size: int, mode: str) -> Tensor:
        """Scores of cells along ``dim`` as scores of elements; 0 for those that no token reads."""
        count, device = scores.shape[dim], scores.device
        if mode == "nearest":
            result = scores.index_select(dim, self.cells(size, count, device))
        else:
            place = self.centres(size, device).clamp(0, count - 1)
            low = place.long().clamp(max=max(count - 2, 0))
            weight = along((place - low).to(scores.dtype), dim, scores.ndim)
            result = torch.lerp(
                scores.index_select(dim, low), scores.index_select(dim, (low + 1).clamp(max=count - 1)), weight
            )
        return result if self.read is None else result * along(self.read.to(result.dtype), dim, scores.ndim)

    def pooled(self, values: Tensor, dim: int, count: int) -> Tensor:
        """Sums of elements' values over their cells."""
        cells = self.cells(values.shape[dim], count, values.device)
        shape = (*values.shape[:dim], count, *values.shape[dim + 1 :])
        return values.new_zeros(shape).index_add(dim, cells, values)


def on_grid(tensor: Tensor, layout: lay.Layout, name: str, batch: int) -> Tensor:
    """Sum a signal over channels and order what remains as ``(N, *grid)``."""
    factors = [factor for factors in layout for factor in factors]
    tensor = tensor.reshape([size for _, size in factors])
    kept = [i for i, (label, _) in enumerate(factors) if label == lay.BATCH or label.startswith(f"{name}.")]
    gone = [i for i in range(len(factors)) if i not in kept]
    if gone:
        tensor = tensor.sum(gone)
    labels = [factors[i][0] for i in kept]
    order = sorted(range(len(labels)), key=lambda i: (labels[i] != lay.BATCH, labels[i]))
    return tensor.permute(order).reshape(batch, *lay.grid(layout, name))


def along(values: Tensor, dim: int, ndim: int) -> Tensor:
    """Values of one axis, shaped for broadcasting."""
    return values.view([-1 if i == dim else 1 for i in range(ndim)])


def evenly(size: int, count: int) -> Placement:
    """Cells that divide the axis into equal parts."""
    return Placement(0, size / count)


def placements(recording: Recording, name: str, node: Node, axes: tuple[int, ...]) -> tuple[Placement, ...]:
    """Where the token grid on which the output of ``node`` lies is found on these axes of an input.

    A grid whose cells are as large as the stride of its convolutions and cover the input lies at its beginning: what
    reaches beyond is padding. Where they leave something over, or nothing tells the stride, the graph is asked. Where
    that gives no regular cells of this stride (a resized input, maxima), the cells divide the input evenly.
    """
    sizes = [recording.inputs.leaves[name].shape[axis] for axis in axes]
    grid = lay.grid(node.layout, name)
    strides = node.tag.stride if len(node.tag.stride) == len(axes) else (0,) * len(axes)
    covered = [s == g or 0 <= g * t - s < t for s, g, t in zip(sizes, grid, strides, strict=True)]
    found = [None] * len(axes) if all(covered) else measured(recording, name, node, axes)
    result = []
    for size, count, stride, covers, place in zip(sizes, grid, strides, covered, found, strict=True):
        if covers and size != count:
            result.append(Placement(0, stride))
        elif covers or place is None or stride not in (0, place.step):
            result.append(evenly(size, count))
        else:
            result.append(place)
    return tuple(result)


def measured(recording: Recording, name: str, node: Node, axes: tuple[int, ...]) -> list[Placement | None]:
    """The placement on each axis by what tokens read, sent back through the recorded operations.

    Two neighbours in the middle, which padding does not cut, must read the same pattern, one step apart. None where
    they do not: such an operation (resizing, maxima) does not read in equal cells.
    """
    middle = [(g - 1) // 2 for g in lay.grid(node.layout, name)]
    try:
        every, first, second = (
            reads(recording, name, node, axes, cell) for cell in (None, middle, [m + 1 for m in middle])
        )
    except UnsupportedOperationError:
        return [None] * len(axes)
    result: list[Placement | None] = []
    for i, m in enumerate(middle):
        step = distance(first[i], second[i])
        places = first[i].nonzero()[:, 0].tolist()
        start = 0 if step is None else (places[0] + places[-1] + 1) / 2 - (m + 0.5) * step
        read = every[i] > 0
        result.append(None if step is None else Placement(start, step, None if read.all() else read))
    return result


def reads(recording: Recording, name: str, node: Node, axes: tuple[int, ...], cell: list[int] | None) -> list[Tensor]:
    """How much each position along each axis of an input is read by one cell of the grid (None: by all together)."""
    assert node.layout is not None
    leaf = recording.inputs.leaves[name]
    with torch.enable_grad():
        probe = torch.zeros(node.shape, dtype=leaf.dtype, device=leaf.device, requires_grad=True)
        tokens = on_grid(probe, node.layout, name, recording.inputs.batch)
        for i in [] if cell is None else cell:
            tokens = tokens[:, i]
        (sent,) = torch.autograd.grad(tokens.sum(), probe)
    (arrived,) = recording.relay(READING, [recording.recorder.edges[node.tag.origin]], [sent], [leaf])
    found = torch.zeros_like(leaf) if arrived is None else arrived.detach()
    return [found.abs().double().sum([i for i in range(found.ndim) if i != axis]) for axis in axes]


def distance(first: Tensor, second: Tensor) -> int | None:
    """How far a pattern has moved to the right; None if it is another one."""
    places = torch.arange(len(first), dtype=torch.float64, device=first.device)
    moved = float((second * places).sum() / second.sum() - (first * places).sum() / first.sum())
    if not math.isfinite(moved) or round(moved) < 1:
        return None
    step = round(moved)
    alike = torch.allclose(first[:-step], second[step:], rtol=1e-3, atol=1e-3 * float(first.max()))
    return step if alike else None


def both(node: Sum, r: Tensor, signal: Signal) -> Grads:
    """A sum reads all that is added."""
    return unbroadcast(r, node.a.shape), unbroadcast(r, node.b.shape)


def pooling(node: Pool, r: Tensor, signal: Signal) -> Grads:
    """What a fixed map reads, whatever lies there."""
    return (node.pullback(r, node.weight),)


READING = Signal("reading", "flow", {**TABLE, Sum: both, Pool: pooling})
"""From a token grid to what its tokens read: the token flow, without anything that depends on the values."""
