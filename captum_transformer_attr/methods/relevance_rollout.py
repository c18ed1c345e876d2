"""RelevanceRollout: attention relevance rolled out without the gradient, an ablation of CVPR 2021."""

from __future__ import annotations

from torch import Tensor

from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.methods.token_level import TokenAttribution
from captum_transformer_attr.ops.attention import Attention


class RelevanceRollout(TokenAttribution):
    """Ā = E_h[(R_A)⁺] under the ``deep_taylor`` rules, rolled out (CVPR 2021, section 4, ablation without ∇A).

    Args:
        model: any module built on softmax attention; used as it is and left as found.
        start_layer: attention calls before this one count as identity.
        normalize: divide the rows of (Ā + I) by their sums; the published code does not.
        output: name or function that chooses the explained tensor of a structured output.
    """

    needs_gradient = False
    needs_relevance = True

    def weights(self, maps: Maps, node: Attention, rows: slice) -> Tensor:
        return maps.relevance(node, rows).clamp_(min=0)
