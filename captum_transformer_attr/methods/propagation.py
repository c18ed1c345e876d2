"""Relevance from the selected output down to any recorded tensors, and what parameters took on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_transformer_attr.recording.session import Recording
from captum_transformer_attr.recording.signal import Signal
from captum_transformer_attr.recording.targets import select

EXPLAINED = ("logit", "probability")


@dataclass(frozen=True)
class Start:
    """Where relevance starts.

    Attributes:
        source: a tensor of the graph with the signal ``signal`` of its shape, or None for the selected output.
        total: the relevance sent, ``(N,)``.
    """

    source: Tensor | None
    signal: Tensor | None
    total: Tensor


@dataclass(frozen=True)
class Propagated:
    """Relevance of the tensors asked for, each of its tensor's shape; what parameters took per module path, ``(N,)``;
    what nothing accounts for."""

    relevance: list[Tensor]
    parameters: dict[str, Tensor]
    delta: Tensor | None

    def minus(self, other: Propagated) -> Propagated:
        """The difference of two passes."""
        paths = {**self.parameters, **other.parameters}
        zeros = {path: torch.zeros_like(share) for path, share in paths.items()}
        mine, others = zeros | self.parameters, zeros | other.parameters
        parameters = {path: mine[path] - others[path] for path in paths}
        relevance = [a - b for a, b in zip(self.relevance, other.relevance, strict=True)]
        delta = None if self.delta is None or other.delta is None else self.delta - other.delta
        return Propagated(relevance, parameters, delta)


def start_of(recording: Recording, table: Signal, explained: str) -> Start:
    """Start at the selected logit with relevance 1, or with gradient 1, or with the gradient of its softmax
    probability."""
    if table.carries == "relevance":
        return Start(None, None, torch.ones_like(recording.selected))
    if explained == "logit":
        subtracted = 0 if recording.subtracted is None else recording.subtracted.detach()
        return Start(None, None, recording.selected.detach() - subtracted)
    with torch.enable_grad():
        logits = recording.output.detach().requires_grad_()
        probability = select(logits.softmax(-1), recording.target)
        (signal,) = torch.autograd.grad(probability.sum(), logits)
    total = (logits.detach() * signal).flatten(1).sum(1)
    return Start(recording.output, signal, total)


def propagate(
    recording: Recording,
    table: Signal,
    start: Start,
    wrt: Sequence[Tensor],
    factors: Sequence[Tensor | None],
    accounting: bool,
) -> Propagated:
    """Relevance from ``start`` to ``wrt`` by ``table``; what arrives there as a modified gradient is multiplied by its
    factor, if any."""
    result = one_pass(recording, table, start, wrt, factors, accounting)
    if table.carries == "gradient" or recording.subtracted is None:
        return result
    # Rules that share a total out cannot take a total of 1 − 1: each term of the difference is propagated alone.
    one = torch.ones_like(recording.subtracted)
    return result.minus(one_pass(recording, table, Start(recording.subtracted, one, one), wrt, factors, accounting))


def one_pass(
    recording: Recording,
    table: Signal,
    start: Start,
    wrt: Sequence[Tensor],
    factors: Sequence[Tensor | None],
    accounting: bool,
) -> Propagated:
    """One backward pass."""
    parameters: dict[str, Tensor] = {}
    arrived = recording.send(table, wrt, start.signal, start.source, parameters if accounting else None)
    if table.carries == "gradient":
        arrived = [g if x is None else x * g for x, g in zip(factors, arrived, strict=True)]
    if not accounting:
        return Propagated(arrived, {}, None)
    dtype = recording.selected.dtype
    delta = unaccounted(recording, start.total, arrived, parameters)
    return Propagated(arrived, {path: r.to(dtype) for path, r in parameters.items()}, delta)


def unaccounted(
    recording: Recording, sent: Tensor, arrived: Sequence[Tensor], parameters: Mapping[str, Tensor]
) -> Tensor:
    """What is left ``(N,)`` of the relevance ``sent`` after what arrived at tensors and what parameters took."""
    rest = sent.double()
    for r in arrived:
        rest = rest - r.double().reshape(recording.inputs.batch, -1).sum(1)
    for taken in parameters.values():
        rest = rest - taken
    return rest.to(recording.selected.dtype)


def leaf_factors(recording: Recording) -> list[Tensor | None]:
    """The inputs' own values; None for token ids, whose handles receive relevance: their embedding was multiplied
    in."""
    floating = [recording.inputs.values[name].is_floating_point() for name in recording.inputs.leaves]
    return [
        leaf.detach() if is_float else None
        for leaf, is_float in zip(recording.inputs.leaves.values(), floating, strict=True)
    ]
