"""The columns of a table: a metric, what it is asked about, and which direction is good."""

from captum_transformer_attr.evaluation.measures.captum_measure import CaptumMeasure
from captum_transformer_attr.evaluation.measures.measure import Column, Measure, OneClassMeasure, entry_scores
from captum_transformer_attr.evaluation.measures.places import Corners, Discriminativeness, Pointing, Segmentation
from captum_transformer_attr.evaluation.measures.rationale import Rationale
from captum_transformer_attr.evaluation.measures.removal import ORDERS, Perturbation, Saco

__all__ = [
    "ORDERS",
    "CaptumMeasure",
    "Column",
    "Corners",
    "Discriminativeness",
    "Measure",
    "OneClassMeasure",
    "Perturbation",
    "Pointing",
    "Rationale",
    "Saco",
    "Segmentation",
    "entry_scores",
]
