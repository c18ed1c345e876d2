"""How good is an explanation? Protocols of the papers, as functions on batches and as accumulators over data sets."""

from captum_transformer_attr.metrics.accumulator import Accumulator, MeanScore
from captum_transformer_attr.metrics.bootstrap import Estimate, bootstrap
from captum_transformer_attr.metrics.captum_scores import CaptumScores, infidelity_and_sensitivity
from captum_transformer_attr.metrics.completeness import completeness
from captum_transformer_attr.metrics.discriminativeness import DiscriminativenessResult, class_discriminativeness
from captum_transformer_attr.metrics.perturbation import (
    PerturbationAUC,
    curve_area,
    perturbation_auc,
    perturbation_curve,
)
from captum_transformer_attr.metrics.pixels import PIXEL_FRACTIONS, PixelRemoval
from captum_transformer_attr.metrics.pointing import (
    PointingGame,
    PointingResult,
    box_masks,
    center_map,
    mass_in_mask,
    pointing_game,
)
from captum_transformer_attr.metrics.ranking import ranks
from captum_transformer_attr.metrics.rationale import ERASER_K, RationaleScores, rationale_auprc, token_f1, word_scores
from captum_transformer_attr.metrics.removal import RemovableUnits, Removal
from captum_transformer_attr.metrics.saco import SacoScores, saco
from captum_transformer_attr.metrics.segmentation import SegmentationResult, SegmentationScores, segmentation_scores
from captum_transformer_attr.metrics.tokens import TOKEN_FRACTIONS, TokenRemoval

__all__ = [
    "ERASER_K",
    "PIXEL_FRACTIONS",
    "TOKEN_FRACTIONS",
    "Accumulator",
    "CaptumScores",
    "DiscriminativenessResult",
    "Estimate",
    "MeanScore",
    "PerturbationAUC",
    "PixelRemoval",
    "PointingGame",
    "PointingResult",
    "RationaleScores",
    "RemovableUnits",
    "Removal",
    "SacoScores",
    "SegmentationResult",
    "SegmentationScores",
    "TokenRemoval",
    "bootstrap",
    "box_masks",
    "center_map",
    "class_discriminativeness",
    "completeness",
    "curve_area",
    "infidelity_and_sensitivity",
    "mass_in_mask",
    "perturbation_auc",
    "perturbation_curve",
    "pointing_game",
    "ranks",
    "rationale_auprc",
    "saco",
    "segmentation_scores",
    "token_f1",
    "word_scores",
]
