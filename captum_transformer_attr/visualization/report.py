"""What is shown: examples with scores per class and method, and tables. No drawing here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]
Scores = Mapping[str, Mapping[str, FloatArray]]
"""Class label -> method name -> scores."""


Box = tuple[float, float, float, float]
"""Left, top, right, bottom, as shares of the picture's width and height."""


VISIBLE = {"\n": "↵", "\r": "↵", "\t": "⇥"}
"""White space that would break a line or its columns -> what is shown instead."""


def visible(token: str) -> str:
    """A token as it is shown: in one line, and with a symbol where it is nothing but white space."""
    if token.isspace():
        return "".join(VISIBLE.get(letter, "␣") for letter in token)
    return "".join(VISIBLE.get(letter, letter) for letter in token)


def _checked(scores: Scores, panel: str) -> dict[str, dict[str, FloatArray]]:
    """A plain copy of ``scores`` whose classes all have the same methods and only finite values."""
    if not scores:
        raise ValueError(f"panel {panel!r} has no scores")
    methods = list(next(iter(scores.values())))
    copied: dict[str, dict[str, FloatArray]] = {}
    for label, by_method in scores.items():
        if list(by_method) != methods:
            raise ValueError(f"panel {panel!r}: class {label!r} has methods {list(by_method)}, others have {methods}")
        for method, values in by_method.items():
            if not np.isfinite(values).all():
                raise ValueError(f"panel {panel!r}: scores of {method} for {label!r} are not finite")
        copied[label] = {method: np.asarray(values) for method, values in by_method.items()}
    return copied


@dataclass(frozen=True)
class ImagePanel:
    """A picture and its score maps.

    Attributes:
        title: What the picture is, e.g. ``"image"``.
        image: ``(H, W, 3)`` uint8.
        scores: Class label -> method -> ``(h, w)``. Maps are stretched over the whole picture.
        boxes: Class label -> a box to outline.
    """

    title: str
    image: npt.NDArray[np.uint8]
    scores: Scores
    boxes: Mapping[str, Box] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype != np.uint8:
            raise ValueError(f"image must be (H, W, 3) uint8, got {self.image.shape} {self.image.dtype}")
        object.__setattr__(self, "scores", _checked(self.scores, self.title))
        for label, by_method in self.scores.items():
            for method, values in by_method.items():
                if values.ndim != 2:
                    raise ValueError(f"map of {method} for {label!r} must be (h, w), got {values.shape}")


@dataclass(frozen=True)
class TextPanel:
    """A text and its scores.

    Attributes:
        title: What the text is, e.g. ``"sentence"``.
        tokens: The words or word pieces, as they are to be read; a mapping from class label to them where every class
            has a text of its own (the captions of one picture).
        scores: Class label -> method -> ``(T,)``, one score per token.
    """

    title: str
    tokens: tuple[str, ...] | Mapping[str, tuple[str, ...]]
    scores: Scores

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", _checked(self.scores, self.title))
        for label, by_method in self.scores.items():
            count = len(self.tokens_of(label))
            for method, values in by_method.items():
                if values.shape != (count,):
                    raise ValueError(
                        f"scores of {method} for {label!r} must be ({count},), one per token, got {values.shape}"
                    )

    def tokens_of(self, label: str) -> tuple[str, ...]:
        """The text that the class ``label`` is about."""
        return tuple(self.tokens[label] if isinstance(self.tokens, Mapping) else self.tokens)


Panel = ImagePanel | TextPanel


@dataclass(frozen=True)
class Example:
    """One explained input: one panel per modality, all with the same classes and methods.

    Attributes:
        title: Heading, e.g. a file name.
        panels: What is drawn.
        probabilities: Class label -> the model's probability, where there is one.
        note: A sentence shown beside the title.
    """

    title: str
    panels: tuple[Panel, ...]
    probabilities: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "panels", tuple(self.panels))
        if not self.panels:
            raise ValueError(f"example {self.title!r} has no panels")
        for panel in self.panels[1:]:
            if list(panel.scores) != self.classes or list(panel.scores[self.classes[0]]) != self.methods:
                raise ValueError(f"example {self.title!r}: its panels differ in classes or methods")

    @property
    def classes(self) -> list[str]:
        return list(self.panels[0].scores)

    @property
    def methods(self) -> list[str]:
        return list(self.panels[0].scores[self.classes[0]])


@dataclass(frozen=True)
class Table:
    """A table of results.

    Attributes:
        title: Heading.
        columns: Names of the value columns.
        rows: ``(row name, one value per column)``; ``None`` where there is no value.
        caption: How to read it.
        higher_is_better: Per column; the best row is emphasised. ``None`` where no value is better.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]
    caption: str = ""
    higher_is_better: tuple[bool | None, ...] = ()

    def __post_init__(self) -> None:
        for name, values in self.rows:
            if len(values) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}: row {name!r} has {len(values)} values, not {len(self.columns)}"
                )
        if not self.higher_is_better:
            object.__setattr__(self, "higher_is_better", (None,) * len(self.columns))
        if len(self.higher_is_better) != len(self.columns):
            raise ValueError(f"table {self.title!r}: higher_is_better must have one entry per column")

    def best_row(self, column: int) -> int | None:
        """Index of the best row of a column, or None where no value is better or all are missing."""
        better = self.higher_is_better[column]
        values = [(row[1][column], index) for index, row in enumerate(self.rows)]
        present = [(value, index) for value, index in values if value is not None]
        if better is None or not present:
            return None
        return (max if better else min)(present, key=lambda pair: pair[0])[1]


@dataclass(frozen=True)
class Report:
    """Everything one page or one picture shows."""

    title: str
    examples: tuple[Example, ...] = ()
    tables: tuple[Table, ...] = ()
    description: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "examples", tuple(self.examples))
        object.__setattr__(self, "tables", tuple(self.tables))
