"""A recorded tensor as it was when it was made: what the model writes into it later (``x += y``) is not seen here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from captum_transformer_attr.recording.tags import Tag, tag_of

if TYPE_CHECKING:
    from captum_transformer_attr.recording.writes import Writes


class Snapshot:
    """What was known of a live tensor at one moment.

    The tensor itself would move on: after a write its values, its tag and its place in the graph are those of what was
    written.

    Attributes:
        value: its values, without a graph.
        edge: where its signals arrive.
        tag: its provenance.
    """

    value: Tensor

    def __init__(self, tensor: Tensor, writes: Writes) -> None:
        self.value = tensor.detach()
        writes.keep(self, "value", tensor)
        # ``get_gradient_edge`` makes a node to keep the graph alive, which costs more than all the rest here.
        self.graph = tensor
        fn = tensor.grad_fn
        self.edge = get_gradient_edge(tensor) if fn is None else GradientEdge(fn, tensor.output_nr)
        self.tag: Tag | None = tag_of(tensor)

    def zeros(self) -> Tensor:
        """A signal of nothing."""
        return torch.zeros_like(self.value)


Place = Tensor | GradientEdge | Snapshot
"""Where signals can start or arrive."""


def edge_at(place: Place) -> Tensor | GradientEdge:
    """As autograd takes it."""
    return place.edge if isinstance(place, Snapshot) else place


def zeros_at(place: Place) -> Tensor:
    """A signal of nothing."""
    if isinstance(place, Snapshot):
        return place.zeros()
    assert isinstance(place, Tensor), "an edge does not tell the shape of its signals"
    return torch.zeros_like(place)
