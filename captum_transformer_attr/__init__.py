"""Class-specific attributions for unmodified transformers, as Captum attribution classes."""

from captum_transformer_attr.coverage import Coverage, CoverageRow, coverage
from captum_transformer_attr.errors import (
    InputError,
    TargetError,
    TransformerAttributionError,
    UnsupportedModelError,
    UnsupportedOperationError,
)
from captum_transformer_attr.methods.attcat import AttCAT
from captum_transformer_attr.methods.attention_gradcam import AttentionGradCam
from captum_transformer_attr.methods.attention_relevance import AttentionRelevance
from captum_transformer_attr.methods.attention_rollout import AttentionRollout
from captum_transformer_attr.methods.consensus import ConsensusRelevance
from captum_transformer_attr.methods.fullgrad_plus import FullGradPlus
from captum_transformer_attr.methods.layer_lrp import LayerTransformerLRP
from captum_transformer_attr.methods.layer_relevance import LayerRelevance
from captum_transformer_attr.methods.legrad import LeGrad
from captum_transformer_attr.methods.neuron_lrp import NeuronTransformerLRP
from captum_transformer_attr.methods.partial_lrp import PartialLRP
from captum_transformer_attr.methods.raw_attention import RawAttention
from captum_transformer_attr.methods.relevance_rollout import RelevanceRollout
from captum_transformer_attr.methods.token_statistics import TokenStatisticsRelevance
from captum_transformer_attr.methods.token_tm import TokenTM
from captum_transformer_attr.methods.transformer_lrp import TransformerLRP
from captum_transformer_attr.methods.transformer_relevance import TransformerRelevance
from captum_transformer_attr.ops.custom import register_rule, unregister_rule
from captum_transformer_attr.recording.outputs import ForwardWrapper
from captum_transformer_attr.recording.targets import Contrast
from captum_transformer_attr.rules.linear_rules import Composite

__all__ = [
    "AttCAT",
    "AttentionGradCam",
    "AttentionRelevance",
    "AttentionRollout",
    "Composite",
    "ConsensusRelevance",
    "Contrast",
    "Coverage",
    "CoverageRow",
    "ForwardWrapper",
    "FullGradPlus",
    "InputError",
    "LayerRelevance",
    "LayerTransformerLRP",
    "LeGrad",
    "NeuronTransformerLRP",
    "PartialLRP",
    "RawAttention",
    "RelevanceRollout",
    "TargetError",
    "TokenStatisticsRelevance",
    "TokenTM",
    "TransformerAttributionError",
    "TransformerLRP",
    "TransformerRelevance",
    "UnsupportedModelError",
    "UnsupportedOperationError",
    "coverage",
    "register_rule",
    "unregister_rule",
]
