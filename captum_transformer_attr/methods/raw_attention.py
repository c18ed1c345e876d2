"""RawAttention: one layer's attention map as it is."""

from __future__ import annotations

from torch import Tensor

from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.methods.single_layer import SingleLayerAttribution
from captum_transformer_attr.ops.attention import Attention


class RawAttention(SingleLayerAttribution):
    """The read-out row of E_h A of one layer, by default the last (the baseline of CVPR 2021, section 4)."""

    needs_gradient = False

    def weights(self, maps: Maps, node: Attention, rows: slice) -> Tensor:
        return node.probabilities(rows)
