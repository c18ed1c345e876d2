"""What a reader hands out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Region:
    """One object in a picture.

    Attributes:
        label: class index, None where the data set does not say.
        name: class name or WordNet id, empty where unknown.
        box: x0, y0, x1, y1 in pixels of the picture, the last pixel not included; None where there is a mask only.
        mask: (H, W) booleans; None where there is a box only.
    """

    label: int | None = None
    name: str = ""
    box: tuple[float, float, float, float] | None = None
    mask: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class ImageExample:
    """A picture with what is known about it.

    Attributes:
        name: file name, or what stands for it.
        image: (H, W, 3) uint8, RGB.
        label: class index, None where unknown.
        regions: the objects in it.
    """

    name: str
    image: np.ndarray
    label: int | None = None
    regions: tuple[Region, ...] = ()

    def mask(self, label: int | None = None) -> np.ndarray:
        """The pixels of all regions, or of those with a label, (H, W) booleans; boxes are filled."""
        height, width = self.image.shape[:2]
        union = np.zeros((height, width), dtype=bool)
        for region in self.regions:
            if label is not None and region.label != label:
                continue
            if region.mask is not None:
                union |= region.mask
            elif region.box is not None:
                x0, y0, x1, y1 = region.box
                rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
                union |= ((rows > y0) & (rows < y1))[:, None] & ((columns > x0) & (columns < x1))[None, :]
        return union


@dataclass(frozen=True, eq=False)
class TextExample:
    """A text with what is known about it.

    Attributes:
        name: the document's id.
        words: the text, split as the rationale counts it.
        label: the class name as the data set spells it.
        rationale: (len(words),) booleans, None where there is none.
        query: the question about the document, empty for plain classification.
    """

    name: str
    words: tuple[str, ...]
    label: str
    rationale: np.ndarray | None = None
    query: str = ""


@dataclass(frozen=True, eq=False)
class QuestionExample:
    """A picture, a question about it, and the answer.

    Attributes:
        name: what stands for the question.
        image: (H, W, 3) uint8, RGB.
        question: the question.
        answer: the right answer.
        mask: (H, W) booleans, the pixels the answer rests on; None where unknown.
    """

    name: str
    image: np.ndarray
    question: str
    answer: str
    mask: np.ndarray | None = None
