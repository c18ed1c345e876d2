"""Class-specific attributions for unmodified transformers, as Captum attribution classes."""

from captum_transformer_attr.coverage import Coverage, CoverageRow, coverage
from captum_transformer_attr.errors import InputError, TargetError, TransformerAttributionError, UnsupportedModelError, UnsupportedOperationError
from captum_transformer_attr.methods.attention_relevance import AttentionRelevance
from captum_transformer_attr.methods.transformer_relevance import TransformerRelevance
from captum_transformer_attr.ops.custom import register_rule, unregister_rule
from captum_transformer_attr.recording.outputs import ForwardWrapper

__all__ = [
    "AttentionRelevance",
    "Coverage",
    "CoverageRow",
    "ForwardWrapper",
    "InputError",
    "TargetError",
    "TransformerAttributionError",
    "TransformerRelevance",
    "UnsupportedModelError",
    "UnsupportedOperationError",
    "coverage",
    "register_rule",
    "unregister_rule",
]
