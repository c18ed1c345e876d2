"""From flow to scores: where the tokens of an input lie, read off the recorded layouts, not model configurations."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.flow.placement import Placement, evenly, on_grid, placements
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
        places: where the grid lies on each of them; empty for grids that divide them evenly.
    """

    scores: Tensor
    axes: tuple[int, ...]
    places: tuple[Placement, ...] = ()

    def spread(self, shape: torch.Size, mode: str) -> Tensor:
        """Scores interpolated over the input's shape ``shape``, equal over the axes that hold no tokens (channels).

        Elements that no token reads get 0.
        """
        scores = self.scores.to(torch.promote_types(self.scores.dtype, torch.float32))
        for i, axis in enumerate(self.axes):
            size, count = shape[axis], scores.shape[i + 1]
            if size != count:
                place = self.places[i] if self.places else evenly(size, count)
                scores = place.spread(scores, i + 1, size, mode)
        scores = scores.to(self.scores.dtype)
        index: list[Any] = [slice(None), *(slice(None) if i in self.axes else None for i in range(1, len(shape)))]
        return scores[tuple(index)].expand(shape).contiguous()


def candidates(recording: Recording, name: str) -> list[Node]:
    """Operations before any attention whose output lies on the token grid of this input."""
    found = []
    for node in recording.nodes:
        if node.tag.attention == 0 and node.tag.weighted > 0 and lay.grid(node.layout, name):
            labels = [label for label_set in lay.labels(node.layout) for label in label_set]
            if lay.FEATURE in labels and not lay.NOT_TOKENS & set(labels) and not lay.is_map(node.layout):
                found.append(node)
    return found


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
            places = placements(recording, name, node, axes)
            return TokenScores(recording.inputs.placed(name, scores), axes, places)
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
        places = placements(recording, name, finest, axes)
        for i, (place, count) in enumerate(zip(places, lay.grid(finest.layout, name), strict=True)):
            flat = place.pooled(flat, i + 1, count)
        return TokenScores(flat, axes, places)
    if values.ndim > 3:
        return TokenScores(values.sum(1), tuple(range(2, values.ndim)))
    return TokenScores(values, tuple(range(1, values.ndim)))
