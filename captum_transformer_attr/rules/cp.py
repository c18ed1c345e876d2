"""The ``cp`` table: conservative propagation (Ali et al., XAI for Transformers: Better Explanations through
Conservative Propagation, ICML 2022)."""

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
    frozen_gate,
    frozen_map,
    tangent,
)

TABLE: dict[type[Node], Rule] = {
    **SHARED,
    Attention: frozen_attention,
    Softmax: frozen_map,
    Elementwise: tangent,
    Product: frozen_gate,
}


def cp(composite: Composite | None = None) -> ModifiedGradient:
    """Gradient × input with attention weights, gates and norms frozen; complete once constants are counted."""
    return ModifiedGradient("cp", TABLE, composite)
