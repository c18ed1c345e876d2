"""PartialLRP: Voita et al., Analyzing Multi-Head Self-Attention, ACL 2019, as used for comparison in CVPR 2021."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.methods.single_layer import SingleLayerAttribution
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.recording.outputs import OutputChoice


class PartialLRP(SingleLayerAttribution):
    """The read-out row of E_h[(R_A)⁺] of one layer, by default the last.

    R_A is the attention's relevance under the ``deep_taylor`` rules, which conserve the total; the paper's own baseline
    used rules that do not.

    Args:
        model: any module built on softmax attention; used as it is and left as found.
        layer: which of a stream's attention calls is read; see ``SingleLayerAttribution``.
        with_gradient: E_h[(∇A ⊙ R_A)⁺] instead: TransformerRelevance cut down to one layer, an ablation of CVPR 2021.
        output: name or function that chooses the explained tensor of a structured output.
    """

    needs_relevance = True

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        layer: int = -1,
        with_gradient: bool = False,
        output: OutputChoice = None,
    ) -> None:
        SingleLayerAttribution.__init__(self, model, layer, output)
        self.needs_gradient = self.with_gradient = with_gradient

    def weights(self, maps: Maps, node: Attention, rows: slice) -> Tensor:
        relevance = maps.relevance(node, rows)
        return (relevance.mul_(maps.gradient(node, rows)) if self.with_gradient else relevance).clamp_(min=0)
