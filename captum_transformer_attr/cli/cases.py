"""The common shape of everything ``explain`` can explain, and the loop over methods and classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import Progress
from torch import nn

from captum_transformer_attr.comparison import Method
from captum_transformer_attr.visualization import Example, ImagePanel, TextPanel
from captum_transformer_attr.visualization.report import FloatArray, Panel


@dataclass(frozen=True)
class ImageView:
    """A picture, and how its map is taken from attributions.

    Attributes:
        title: Heading of the panel.
        image: ``(H, W, 3)`` uint8.
        scores: From a method's result to ``(h, w)``.
    """

    title: str
    image: npt.NDArray[np.uint8]
    scores: Callable[[Any], FloatArray]


@dataclass(frozen=True)
class TextView:
    """A text, and how its scores are taken from attributions.

    Attributes:
        title: Heading of the panel.
        tokens: What is shown, words or pieces.
        scores: From a method's result to ``(len(tokens),)``.
    """

    title: str
    tokens: tuple[str, ...]
    scores: Callable[[Any], FloatArray]


@dataclass(frozen=True)
class Case:
    """One input to explain.

    Attributes:
        title: Heading.
        inputs: A batch of one, as the model takes it.
        targets: ``(label, Captum target)`` of every class to explain.
        views: One per modality.
        probabilities: Label -> probability.
        note: A sentence beside the heading.
    """

    title: str
    inputs: Any
    targets: tuple[tuple[str, Any], ...]
    views: tuple[ImageView | TextView, ...]
    probabilities: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


def explain_cases(
    model: nn.Module, cases: Sequence[Case], methods: Sequence[Method], progress: Progress
) -> tuple[Example, ...]:
    """Attribute every class of every case by every method.

    Args:
        model: What all cases are inputs of.
        cases: What to explain.
        methods: How.
        progress: Where to show how far it is.
    """
    task = progress.add_task("explaining", total=sum(len(case.targets) for case in cases) * len(methods))
    examples = []
    for case in cases:
        scores: list[dict[str, dict[str, FloatArray]]] = [{} for _ in case.views]
        for label, target in case.targets:
            for method in methods:
                progress.update(task, description=f"{method.name}: {label}")
                attributions = method.attribute(model, case.inputs, target)
                for view, by_class in zip(case.views, scores, strict=True):
                    by_class.setdefault(label, {})[method.name] = view.scores(attributions)
                progress.advance(task)
        panels = tuple(_panel(view, by_class) for view, by_class in zip(case.views, scores, strict=True))
        examples.append(Example(case.title, panels, dict(case.probabilities), case.note))
    return tuple(examples)


def _panel(view: ImageView | TextView, scores: dict[str, dict[str, FloatArray]]) -> Panel:
    if isinstance(view, ImageView):
        return ImagePanel(view.title, view.image, scores)
    return TextPanel(view.title, view.tokens, scores)
