"""TransformerRelevance: Chefer, Gur, Wolf, Transformer Interpretability Beyond Attention Visualization, CVPR 2021."""

from __future__ import annotations

from torch import Tensor

from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.methods.token_level import TokenAttribution
from captum_transformer_attr.ops.attention import Attention


class TransformerRelevance(TokenAttribution):
    """LRP × gradient, rolled out (CVPR 2021, eq. 12-14).

    Ā_b = E_h[(∇A_b ⊙ R_{A_b})⁺] for every attention b, C = (Ā_L + I) ··· (Ā_s + I); the read-out rows of C, identity
    taken out. ∇A is the gradient of the selected logit; R_A its relevance under the ``deep_taylor`` rules, which
    conserve the total of 1.

    These rules divide by sums that nearly cancel, as published: on trained models float32 keeps two digits of the
    scores, often fewer (docs/results/completeness.md). Use ``model.double()`` where numbers must be the same on another
    machine.

    Args:
        model: any module built on softmax attention; used as it is and left as found.
        start_layer: s, 0-based over attention calls; negative counts from the end. The paper's ViT evaluations use 1.
        normalize: divide the rows of (Ā + I) by their sums, as the published BERT code does.
        output: name or function that chooses the explained tensor of a structured output.

    Example:
        >>> heat = TransformerRelevance(model).attribute(pixels, target=281)  # (N, C, H, W)
    """

    needs_relevance = True

    def weights(self, maps: Maps, node: Attention, rows: slice) -> Tensor:
        return maps.gradient(node, rows).mul_(maps.relevance(node, rows)).clamp_(min=0)
