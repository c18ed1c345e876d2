"""What an attribution class finds out about the inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_transformer_attr.flow.geometry import TokenScores
from captum_transformer_attr.recording.inputs import Inputs


@dataclass(frozen=True)
class Scored:
    """Token scores of every explained input, and the convergence delta if it was asked for."""

    tokens: dict[str, TokenScores]
    delta: Tensor | None = None

    def spread(self, inputs: Inputs, interpolate: str) -> dict[str, Tensor]:
        """Scores in the shape of the inputs."""
        return {name: t.spread(inputs.shape(name), interpolate) for name, t in self.tokens.items()}


def join_scored(results: list[Scored]) -> Scored:
    """Results of single examples as one batch."""
    tokens = {
        name: TokenScores(torch.cat([r.tokens[name].scores for r in results]), first.axes, first.places)
        for name, first in results[0].tokens.items()
    }
    deltas = [r.delta for r in results if r.delta is not None]
    return Scored(tokens, torch.cat(deltas) if deltas else None)
