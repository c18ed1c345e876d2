"""AttentionRollout: Abnar and Zuidema, Quantifying Attention Flow in Transformers, ACL 2020."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.methods.token_level import TokenAttribution
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.recording.outputs import OutputChoice


class AttentionRollout(TokenAttribution):
    """Attention maps multiplied from layer to layer (ACL 2020, eq. 1): rows of (E_h A + I) divided by their sums, then
    rolled out.

    Says where information could have come from, whatever the class: of ``target`` only the read-out row matters. What
    its own token holds of it by residuals alone, 1/2 per layer, is taken out.

    Args:
        model: any module built on softmax attention; used as it is and left as found.
        start_layer: attention calls before this one count as identity.
        normalize: divide the rows of (E_h A + I) by their sums, as published.
        output: name or function that chooses the explained tensor of a structured output.
    """

    needs_gradient = False

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        start_layer: int = 0,
        normalize: bool = True,
        output: OutputChoice = None,
    ) -> None:
        TokenAttribution.__init__(self, model, start_layer, normalize, output)

    def weights(self, maps: Maps, node: Attention, rows: slice) -> Tensor:
        return node.probabilities(rows)
