"""Our text scores in Captum's text visualiser."""

from __future__ import annotations

import torch
from captum.attr import visualization as captum_visualization

from captum_transformer_attr.visualization.colors import text_scale
from captum_transformer_attr.visualization.report import Example, TextPanel


def text_records(example: Example, true_class: str = "") -> list[captum_visualization.VisualizationDataRecord]:
    """Records for ``captum.attr.visualization.visualize_text``, one per text, class and method.

    Captum clips scores to [-1, 1], so each sequence is divided by its largest magnitude.

    Args:
        example: An example with at least one text panel.
        true_class: Shown as the true label.
    """
    records = []
    for panel in example.panels:
        if not isinstance(panel, TextPanel):
            continue
        for label, by_method in panel.scores.items():
            for method, scores in by_method.items():
                largest = text_scale(scores).high or 1.0
                records.append(
                    captum_visualization.VisualizationDataRecord(
                        word_attributions=torch.tensor(scores / largest),
                        pred_prob=example.probabilities.get(label, float("nan")),
                        pred_class=max(example.probabilities, key=lambda name: example.probabilities[name], default=""),
                        true_class=true_class,
                        attr_class=f"{label} · {method}",
                        attr_score=float(scores.sum()),
                        raw_input_ids=list(panel.tokens_of(label)),
                        convergence_score=float("nan"),
                    )
                )
    return records
