"""TokenTM: Wu, Duan, Kang, Tang and Yan, Token Transformation Matters: Towards Faithful Post-hoc Explanation for Vision
Transformer, CVPR 2024."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.flow.token_flow import Weights
from captum_transformer_attr.flow.token_transformation import (
    PROJECTION,
    TRUNK,
    TransformationFlow,
    Transformations,
    transformations,
)
from captum_transformer_attr.methods.token_level import TokenAttribution, terminal_sums
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.recording.outputs import OutputChoice
from captum_transformer_attr.recording.session import Recording


class TokenTM(TokenAttribution):
    """Gradient × attention rolled out and weighted by how layers change the length and direction of tokens
    (arXiv 2403.14552).

    The paper's full text was not at hand; this is written from the following reading of it. A layer that turns token
    e_j into ẽ_j has the weight w_j = (|ẽ_j| / |e_j|) · NECC_j with L2 lengths over channels and
    NECC_j = exp(cos(e_j, ẽ_j)) / mean_k exp(cos(e_k, ẽ_k)), the mean over the example's tokens, padding left out.

    - attention: U_att = O diag(w) + I, O = E_h[(∇A ⊙ A)⁺]; e enters the layer, ẽ are the values of all
      heads side by side. Grouped heads are repeated as the attention reads them, so that ẽ is as wide as what the
      attention gives. Row vector: r ← r + (r O) ⊙ w.
    - feed-forward: U_ffn = diag(w) + I; e enters the branch, ẽ is what the branch adds to the trunk
      (behind its own norm or layer scale, where there are any). Row vector: r ← r ⊙ (1 + w).
    - C = U_ffn^L U_att^L ··· U_ffn^1 U_att^1 C_0, C_0 = diag(|e⁰|), e⁰ the tokens that enter the first block.

    Scores are the read-out rows of C without what they hold of themselves by residuals and feed-forward branches alone,
    Π_l (1 + w_ffn^l) |e⁰|, in the place of R − I of the other methods. Whatever lies in front of the first attention's
    residual makes the tokens, and what follows the read-out is no block: neither has a factor.

    Needs blocks of self-attention and token-wise branches, one after the other, over the same tokens, with values as
    wide as the tokens. Windows, merged tokens, cross-attention, convolutions, experts and parallel branches are refused
    by name.

    Args:
        model: any module built on such blocks; used as it is and left as found.
        entering: what e is: ``"trunk"``, the token on the residual trunk in front of the branch, as in C_0, or
            ``"projection"``, the token that the branch's first linear map reads, behind a norm if there is one; one and
            the same in post-norm models.
        feed_forward: False takes U_ffn = I, as the methods do that follow attention only.
        output: name or function that chooses the explained tensor of a structured output.

    On the trained models tried, feed-forward factors harm, and with ``"projection"`` they ruin the map: block 7 of
    ViT-Tiny makes corner patches forty times longer than the others (w = 25, median 0.35), and behind the norms the
    blocks above no longer see that length, so that nothing takes the factor back. ``benchmarks.faithfulness``:
    rationales of SST (MiniLM, 100 sentences), boxes of Tiny ImageNet (ViT-Tiny, 60 pictures), removal of pixels
    (ViT-Tiny, 40 pictures, positive ↓ / negative ↑, predicted class; the intervals overlap):

    =================================================  =====  ========  =======  ===========
    variant                                            AUPRC  pointing  corners  removal
    =================================================  =====  ========  =======  ===========
    default                                            0.574  0.721     1.018    10.6 / 49.5
    ``entering="projection"``                          0.574  0.098     2.458    12.6 / 49.9
    ``feed_forward=False``                             0.773  0.850     0.861    11.1 / 53.0
    ``entering="projection"``, ``feed_forward=False``  0.773  0.817     0.919    10.4 / 52.4
    AttentionRelevance                                 0.749  0.733     1.004    9.4 / 52.5
    =================================================  =====  ========  =======  ===========

    Example:
        >>> heat = TokenTM(vit).attribute(pixels, target=3)  # (N, C, H, W)
    """

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        entering: str = TRUNK,
        feed_forward: bool = True,
        output: OutputChoice = None,
    ) -> None:
        TokenAttribution.__init__(self, model, 0, False, output)
        if entering not in (PROJECTION, TRUNK):
            raise InputError(f"entering={entering!r}: choose one of {PROJECTION}, {TRUNK}")
        self.entering, self.feed_forward = entering, feed_forward

    def weights(self, maps: Maps, node: Attention, rows: slice) -> Tensor:
        relevance = (maps.gradient(node, rows) * node.probabilities(rows)).clamp_(min=0)
        return relevance * self.transformations(maps.recording).columns[node]

    def flow(
        self, recording: Recording, weights: Weights, active: list[Attention], trunk_only: bool
    ) -> TransformationFlow:
        found = self.transformations(recording)
        return TransformationFlow(weights, active, terminal_sums(recording), trunk_only, found)

    def transformations(self, recording: Recording) -> Transformations:
        """The weights of one recording."""
        return transformations(recording, self.entering, self.feed_forward)
