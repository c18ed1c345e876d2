"""From flow to scores: where the tokens of an input lie, read off the recorded layouts, not model configurations."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_transformer_attr.flow.rollout import Passed
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording.node import Node
from captum_transformer_attr.recording.session import Recording


@dataclass(frozen=True)
class TokenScores:
    """Scores of one input's tokens.

    Attributes:
        scores: ``(N, *grid)``.
        axes: the input's axes the grid lies on.
        stride: input elements per grid step where convolutions tell, else empty.
    """

    scores: Tensor
    axes: tuple[int, ...]
    stride: tuple[int, ...] = ()

    def spread(self, shape: torch.Size, mode: str) -> Tensor:
        """Scores interpolated over the input's shape ``shape``, equal over the axes that hold no tokens (channels)."""
        sizes = [shape[i] for i in self.axes]
        scores = self.scores
        if list(scores.shape[1:]) != sizes:
            full = [
                max(s, g * t) for s, g, t in zip(sizes, scores.shape[1:], self.stride or (0,) * len(sizes), strict=True)
            ]
            method = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(sizes)] if mode == "bilinear" else "nearest-exact"
            exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
            wide = F.interpolate(exact[:, None], full, mode=method, align_corners=False if mode == "bilinear" else None)
            # A padded grid (an input that the patch size does not divide) reaches beyond the input.
            inside: list[Any] = [slice(None), 0, *(slice(0, s) for s in sizes)]
            scores = wide[tuple(inside)].to(scores.dtype)
        index: list[Any] = [slice(None), *(slice(None) if i in self.axes else None for i in range(1, len(shape)))]
        return scores[tuple(index)].expand(shape).contiguous()


def candidates(recording: Recording, name: str) -> list[Node]:
    """Operations before any attention whose output lies on the token grid of this input."""
    found = []
    for node in recording.nodes:
        if node.tag.attention == 0 and node.tag.weighted > 0 and lay.grid(node.layout, name):
            labels = [label for label_set in lay.labels(node.layout) for label in label_set]
            if lay.FEATURE in labels and lay.MIXED not in labels and not lay.is_map(node.layout):
                found.append(node)
    return found


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


def axes_of(layout: lay.Layout, name: str) -> tuple[int, ...]:
    """The input's axes that a layout's token axes come from."""
    labels = {label for factors in layout for label, _ in factors if label.startswith(f"{name}.")}
    return tuple(sorted(int(label.rpartition(".")[2]) for label in labels))


def passed_by_all(node: Node, reached: Collection[Node], number: int) -> bool:
    """Whether every way of the flow to input ``number`` leads through ``node``.

    Nothing later reads what was there before it.

    Decided by the graph alone, so that an example is read off at the same place alone and in a batch.
    """
    return all(
        tag is None or not tag.ancestors >> number & 1 or tag.comes_from(node.tag)
        for later in reached
        if later.index > node.index
        for tag in later.sources
    )


def token_scores(recording: Recording, name: str, everything: Passed, trunk: Passed) -> TokenScores:
    """Scores of one input from what passed, the trunk's share taken out."""
    number = recording.inputs.explained.index(name)
    result = everything.arrived[number] - trunk.arrived[number]
    if not recording.inputs.values[name].is_floating_point():
        return TokenScores(result, tuple(range(1, result.ndim)))
    batch = recording.inputs.batch
    grids = {
        node: on_grid(everything.seen[node], node.layout, name, batch)
        for node in candidates(recording, name)
        if node in everything.seen and node.layout is not None
    }
    for node, here in reversed(grids.items()):
        # The last operation that everything passes: later ones lie in branches, earlier ones on coarser or finer grids.
        if passed_by_all(node, everything.reached, number):
            assert node.layout is not None
            at_trunk = trunk.seen.get(node)
            scores = here if at_trunk is None else here - on_grid(at_trunk, node.layout, name, batch)
            axes = axes_of(node.layout, name)
            stride = node.tag.stride if len(node.tag.stride) == len(axes) else ()
            return TokenScores(recording.inputs.placed(name, scores), axes, stride)
    return pooled_scores(recording, name, result)


def pooled_scores(recording: Recording, name: str, values: Tensor) -> TokenScores:
    """Scores of an input's tokens: sums of its elements' values over every token's part, and over channels."""
    nodes = candidates(recording, name)
    if values.ndim == 3:
        return TokenScores(values.sum(-1), (1,))
    if nodes and values.ndim > 3:
        # Where no candidate was made from another one the streams of tokens begin; their finest grid is taken.
        last = [
            node
            for node in nodes
            if not any(other.tag.ancestors >> node.tag.origin & 1 for other in nodes if other is not node)
        ]
        finest = max(last, key=lambda node: math.prod(lay.grid(node.layout, name)))
        assert finest.layout is not None
        axes = axes_of(finest.layout, name)
        flat = values.sum([i for i in range(1, values.ndim) if i not in axes])
        size = [flat.shape[i + 1] / g for i, g in enumerate(lay.grid(finest.layout, name))]
        pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(axes) - 1]
        pooled = pool(flat[:, None], lay.grid(finest.layout, name))
        return TokenScores(pooled[:, 0] * math.prod(size), axes)
    if values.ndim > 3:
        return TokenScores(values.sum(1), tuple(range(2, values.ndim)))
    return TokenScores(values, tuple(range(1, values.ndim)))
