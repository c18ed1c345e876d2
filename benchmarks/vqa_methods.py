"""What the bi-modal benchmark compares: the methods, what changes one thing about AttentionRelevance, the controls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from captum_transformer_attr import AttentionRelevance
from captum_transformer_attr.comparison import Method, resolve
from captum_transformer_attr.evaluation import random_method
from captum_transformer_attr.evaluation.batch import runner_up
from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.recording.outputs import unwrap
from captum_transformer_attr.recording.targets import Contrast

METHODS = (
    "AttentionRelevance",
    "AttentionRelevance:normalize=false",
    "AttentionRelevance:self_terms=false",
    "TransformerRelevance",
    "TransformerLRP",
    "AttentionRollout",
    "RawAttention",
    "AttentionGradCam",
    "InputXGradient",
)
ABSOLUTE, AGAINST, ORACLE = (
    "AttentionRelevance, absolute ∇A ⊙ A",
    "AttentionRelevance, against the runner-up",
    "ShapeFirst",
)


class AbsoluteRelevance(AttentionRelevance):
    """E_h|∇A ⊙ A| in place of eq. 5: what speaks against the answer counts as well."""

    def weights(self, maps: Maps, node: Attention, rows: slice) -> Tensor:
        return (maps.gradient(node, rows) * node.probabilities(rows)).abs()


def against_the_runner_up(model: nn.Module, inputs: Any, target: Tensor) -> Any:
    """AttentionRelevance of the difference between the target's logit and that of the best other answer."""
    with torch.no_grad():
        logits = unwrap(model(**inputs))
    return AttentionRelevance(model).attribute(inputs, Contrast(target, runner_up(logits, target)))


def shape_first(model: nn.Module, inputs: Any, target: Any) -> Any:
    """The true region: for every patch of the picture how many of its 64 pixels differ from the background.

    Knows nothing of the question; its words get equal scores.
    """
    regions = next(name for name in ("visual_embeds", "visual_feats") if name in inputs)
    pixels = inputs[regions][..., :192].unflatten(-1, (64, 3))
    scores = {name: torch.zeros(value.shape) for name, value in inputs.items() if name == "input_ids"}
    cover = []
    for picture in pixels:
        colours, counts = picture.flatten(0, 1).unique(dim=0, return_counts=True)
        cover.append((picture != colours[counts.argmax()]).any(-1).sum(-1).float())
    return scores | {regions: torch.stack(cover)[..., None].expand_as(inputs[regions])}


def absolute() -> Method:
    """The ablation as a method of the table."""
    return Method(ABSOLUTE, lambda model, inputs, target: AbsoluteRelevance(model).attribute(inputs, target))


def question_methods(crossing: bool) -> list[Method]:
    """For questions: methods, ablations, the true region and random scores.

    Args:
        crossing: whether the model has cross-attention; without it the options of rule 10 change nothing.
    """
    ablations = [absolute(), Method(AGAINST, against_the_runner_up)]
    names = [name for name in METHODS if crossing or not name.startswith("AttentionRelevance:")]
    return [*resolve(names), *ablations, Method(ORACLE, shape_first), random_method()]


def detector_methods() -> list[Method]:
    """For detections."""
    return [*resolve(list(METHODS)), absolute(), random_method()]
