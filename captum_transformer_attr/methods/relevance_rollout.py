"""RelevanceRollout: attention relevance rolled out without the gradient, an ablation of CVPR 2021."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.methods.token_level import TokenAttribution
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.recording.outputs import OutputChoice


class RelevanceRollout(TokenAttribution):
    """Ā = E_h[(R_A)⁺] under the ``deep_taylor`` rules, rolled out as in AttentionRollout (CVPR 2021, section 4, ablation without ∇A).

    Args:
        model: any module built on softmax attention; used as it is and left as found.
        start_layer: attention calls before this one count as identity.
        normalize: divide the rows of (Ā + I) by their sums, as published.
        output: name or function that chooses the explained tensor of a structured output.
    """

    needs_gradient = False
    needs_relevance = True

    def __init__(
        self, model: nn.Module | Callable[..., Any], start_layer: int = 0, normalize: bool = True, output: OutputChoice = None
    ) -> None:
        TokenAttribution.__init__(self, model, start_layer, normalize, output)

    def weights(self, maps: Maps, node: Attention, rows: slice) -> Tensor:
        return maps.relevance(node, rows).clamp_(min=0)
