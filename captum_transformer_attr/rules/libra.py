"""The ``libra`` table: Mehri et al., LibraGrad: Balancing Gradient Flow for Universally Better Vision Transformer
Attributions, CVPR 2025."""

from __future__ import annotations

from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.ops.elementwise import Elementwise
from captum_transformer_attr.ops.product import Product
from captum_transformer_attr.ops.softmax import Softmax
from captum_transformer_attr.recording.node import Node
from captum_transformer_attr.recording.signal import Rule
from captum_transformer_attr.rules.linear_rules import Composite
from captum_transformer_attr.rules.modified_gradient import (
    SHARED,
    ModifiedGradient,
    frozen_attention,
    frozen_map,
    routed_gate,
    slope,
)

TABLE: dict[type[Node], Rule] = {
    **SHARED,
    Attention: frozen_attention,
    Softmax: frozen_map,
    Elementwise: slope,
    Product: routed_gate,
}


def libra(composite: Composite | None = None) -> ModifiedGradient:
    """Attention and norms frozen, activations by their slope f(x)/x, gates halved; complete once constants are
    counted."""
    return ModifiedGradient("libra", TABLE, composite)
