"""ConsensusRelevance: where gradient × attention and the layers' own relevance agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_transformer_attr.methods.attention_relevance import AttentionRelevance
from captum_transformer_attr.methods.base import Result
from captum_transformer_attr.methods.fullgrad_plus import FullGradPlus
from captum_transformer_attr.methods.scored import Scored
from captum_transformer_attr.methods.token_level import TokenAttribution
from captum_transformer_attr.recording.inputs import Inputs
from captum_transformer_attr.recording.outputs import OutputChoice
from captum_transformer_attr.recording.session import Recording


class ConsensusRelevance(TokenAttribution):
    """Mean of the ranks that ``AttentionRelevance`` and ``FullGradPlus`` give a token.

    score_i = (ρ_i(a) + ρ_i(f)) / 2 with a the scores of ``AttentionRelevance``, f those of ``FullGradPlus``, and
    ρ_i(s) = (#{j: s_j < s_i} + #{j: s_j = s_i} / 2) / n, a number between 0 and 1. Tokens that neither method
    gives anything (padding) do not count among the n and have score 0. Tokens of several inputs are ranked together.

    One method follows the attention, the other the residual stream. Scores order tokens; they are shares of nothing and
    never negative. Perturbation, positive ↓ / negative ↑ (tables under ``docs/results``; 300 pictures each): ahead of
    both attention methods in both directions, level with ``FullGradPlus`` on the ViT and behind it on the Swin.

    =======================  =======================  ====================================
    method                   ViT-Tiny, pixels         Swin, squares of 8 x 8 pixels
    =======================  =======================  ====================================
    ConsensusRelevance       10.0 / 51.4              21.8 / 39.6
    AttentionRelevance       10.9 / 48.1              23.9 / 37.6
    FullGradPlus             9.8 / 51.2               20.3 / 40.8
    TransformerRelevance     11.0 / 45.8              25.5 / 37.4
    =======================  =======================  ====================================

    Args:
        model: any module built on softmax attention; used as it is and left as found.
        output: name or function that chooses the explained tensor of a structured output.

    Example:
        >>> heat = ConsensusRelevance(vit).attribute(pixels, target=281)  # (N, C, H, W)
    """

    def __init__(self, model: nn.Module | Callable[..., Any], output: OutputChoice = None) -> None:
        TokenAttribution.__init__(self, model, 0, False, output)
        self.attention = AttentionRelevance(model, output=output)
        self.layers = FullGradPlus(model, output=output)

    def once(self, inputs: Inputs, target: Any, compute: Callable[[Recording], Result]) -> Result:
        # AttentionRelevance knows when it has to record again for the relations among learned queries. Captum's
        # consumers exchange our forward function, not its.
        self.attention.forward_func = self.forward_func
        return self.attention.once(inputs, target, compute)

    def score(self, recording: Recording, delta: bool) -> Scored:
        parts = [self.attention.score(recording, delta), self.layers.score(recording, False)]
        names = list(parts[0].tokens)
        sizes = [parts[0].tokens[name].scores[0].numel() for name in names]
        together = [torch.cat([part.tokens[name].scores.flatten(1) for name in names], 1) for part in parts]
        ranked = torch.stack(shared_ranks(together)).mean(0).split(sizes, 1)
        tokens = {
            name: replace(parts[0].tokens[name], scores=values.view_as(parts[0].tokens[name].scores))
            for name, values in zip(names, ranked, strict=True)
        }
        return Scored(tokens, parts[0].delta)


def shared_ranks(maps: Sequence[Tensor]) -> list[Tensor]:
    """Ranks between 0 and 1 of several maps (N, tokens) among the tokens that any of them scores; 0 for the others."""
    present = torch.stack([scores != 0 for scores in maps]).any(0)
    absent, count = (~present).sum(1, keepdim=True), present.sum(1, keepdim=True)
    result = []
    for scores in maps:
        values = scores.masked_fill(~present, float("-inf"))
        ordered = values.sort(1).values
        below = torch.searchsorted(ordered, values) - absent
        up_to = torch.searchsorted(ordered, values, right=True) - absent
        ranks = (below + up_to).to(scores.dtype) / (2 * count.clamp(min=1))
        result.append(ranks.masked_fill(~present, 0))
    return result
