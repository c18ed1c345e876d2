"""The ``attnlrp`` table: Achtibat et al., AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers,
ICML 2024."""

from __future__ import annotations

from captum_transformer_attr.ops.attention import FusedAttention, ValueProduct
from captum_transformer_attr.ops.elementwise import Elementwise
from captum_transformer_attr.ops.product import Product
from captum_transformer_attr.recording.node import Node
from captum_transformer_attr.recording.signal import Rule
from captum_transformer_attr.rules.linear_rules import Composite
from captum_transformer_attr.rules.modified_gradient import (
    SHARED,
    ModifiedGradient,
    halved_attention,
    halved_gate,
    halved_value_product,
    slope,
)

TABLE: dict[type[Node], Rule] = {
    **SHARED,
    ValueProduct: halved_value_product,
    FusedAttention: halved_attention,
    Elementwise: slope,
    Product: halved_gate,
}


def attnlrp(composite: Composite | None = None) -> ModifiedGradient:
    """Deep Taylor decomposition of softmax and products: half to each factor, the softmax by its own gradient, norms
    frozen.

    The softmax's linearisation leaves a constant that belongs to no parameter: it shows up in the convergence delta.
    """
    return ModifiedGradient("attnlrp", TABLE, composite)
