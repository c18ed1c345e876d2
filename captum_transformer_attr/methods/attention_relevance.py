"""AttentionRelevance: Chefer, Gur and Wolf, Generic Attention-model Explainability, ICCV 2021."""

from __future__ import annotations

from torch import Tensor

from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.methods.token_level import TokenAttribution
from captum_transformer_attr.ops.attention import Attention


class AttentionRelevance(TokenAttribution):
    """Gradient × attention, rolled out (ICCV 2021, eq. 5-6): Ā = E_h[(∇A ⊙ A)⁺], R ← R + Ā R.

    Example:
        >>> heat = AttentionRelevance(model).attribute(pixels, target=281)  # (N, C, H, W)
    """

    def weights(self, maps: Maps, node: Attention, rows: slice) -> Tensor:
        return (maps.gradient(node, rows) * node.probabilities(rows)).clamp_(min=0)
