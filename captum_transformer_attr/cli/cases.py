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
from captum_transformer_attr.visualization.report import Box, FloatArray, Panel

TakeScores = Callable[[Any, str], FloatArray]
"""From a method's result and the label of what was asked to the scores that a view shows."""


@dataclass(frozen=True)
class Question:
    """One thing to explain about a case.

    Attributes:
        label: How it is shown, e.g. the name of the class.
        target: Captum's target.
        inputs: A batch of one, as the model takes it.
        probability: What the model gives to it, where there is such a thing.
    """

    label: str
    target: Any
    inputs: Any
    probability: float | None = None


@dataclass(frozen=True)
class ImageView:
    """A picture, and how its map is taken from attributions.

    Attributes:
        title: Heading of the panel.
        image: ``(H, W, 3)`` uint8.
        scores: To ``(h, w)``.
        boxes: Label -> the box of what was asked: left, top, right, bottom as shares of the picture.
    """

    title: str
    image: npt.NDArray[np.uint8]
    scores: TakeScores
    boxes: Mapping[str, Box] = field(default_factory=dict)


@dataclass(frozen=True)
class TextView:
    """A text, and how its scores are taken from attributions.

    Attributes:
        title: Heading of the panel.
        tokens: What is shown, words or pieces; by label where every question has a text of its own.
        scores: To one score per token.
    """

    title: str
    tokens: tuple[str, ...] | Mapping[str, tuple[str, ...]]
    scores: TakeScores


@dataclass(frozen=True)
class Case:
    """What the user gave, and what is asked about it.

    Attributes:
        title: Heading.
        questions: Classes, answers, objects or generated tokens to explain; their labels differ.
        views: One per modality.
        note: A sentence beside the heading.
    """

    title: str
    questions: tuple[Question, ...]
    views: tuple[ImageView | TextView, ...]
    note: str = field(default="")


def explain_cases(
    model: nn.Module, cases: Sequence[Case], methods: Sequence[Method], progress: Progress
) -> tuple[Example, ...]:
    """Answer every question of every case by every method.

    Args:
        model: What all cases are inputs of.
        cases: What to explain.
        methods: How.
        progress: Where to show how far it is.
    """
    task = progress.add_task("explaining", total=sum(len(case.questions) for case in cases) * len(methods))
    examples = []
    for case in cases:
        scores: list[dict[str, dict[str, FloatArray]]] = [{} for _ in case.views]
        for question in case.questions:
            for method in methods:
                progress.update(task, description=f"{method.name}: {question.label}")
                attributions = method.attribute(model, question.inputs, question.target)
                for view, by_label in zip(case.views, scores, strict=True):
                    by_label.setdefault(question.label, {})[method.name] = view.scores(attributions, question.label)
                progress.advance(task)
        panels = tuple(_panel(view, by_label) for view, by_label in zip(case.views, scores, strict=True))
        known = {q.label: q.probability for q in case.questions if q.probability is not None}
        examples.append(Example(case.title, panels, known, case.note))
    return tuple(examples)


def _panel(view: ImageView | TextView, scores: dict[str, dict[str, FloatArray]]) -> Panel:
    if isinstance(view, ImageView):
        return ImagePanel(view.title, view.image, scores, view.boxes)
    return TextPanel(view.title, view.tokens, scores)
