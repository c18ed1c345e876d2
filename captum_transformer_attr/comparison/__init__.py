"""Our methods and Captum's in one call."""

from captum_transformer_attr.comparison.compare import (
    DEFAULT_METHODS,
    Comparison,
    MethodResult,
    compare,
)
from captum_transformer_attr.comparison.methods import Method, method, method_names, resolve
from captum_transformer_attr.comparison.quantus import quantus_explain_func
from captum_transformer_attr.comparison.scores import element_scores, rank_correlation

__all__ = [
    "DEFAULT_METHODS",
    "Comparison",
    "Method",
    "MethodResult",
    "compare",
    "element_scores",
    "method",
    "method_names",
    "quantus_explain_func",
    "rank_correlation",
    "resolve",
]
