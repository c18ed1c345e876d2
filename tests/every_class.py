"""Every public attribution class that needs nothing but a model."""

import captum_transformer_attr as cta

CLASSES = [
    cta.TransformerRelevance,
    cta.AttentionRelevance,
    cta.TokenStatisticsRelevance,
    cta.TokenTM,
    cta.TransformerLRP,
    cta.AttentionRollout,
    cta.RawAttention,
    cta.AttentionGradCam,
    cta.PartialLRP,
    cta.RelevanceRollout,
    cta.FullGradPlus,
    cta.AttCAT,
    cta.LeGrad,
    cta.ConsensusRelevance,
]
