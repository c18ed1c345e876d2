"""easy-VQA (Victor Zhou, 2019): one coloured shape per picture, so the pixels that matter are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from captum_transformer_attr.datasets.errors import DatasetError
from captum_transformer_attr.datasets.examples import QuestionExample
from captum_transformer_attr.datasets.files import FileStore, parse_json
from captum_transformer_attr.datasets.reader import Reader


class EasyVqa(Reader[QuestionExample]):
    """Questions on one split, each with the shape's pixels as its mask.

    Args:
        path: the data set's folder or archive, with `<split>/questions.json`, `<split>/images/` and `answers.txt`.
        split: `"train"` or `"test"`.
        distance: a pixel belongs to the shape if a channel differs from the background (the most frequent colour)
            by more than this, of 255.

    Attributes:
        answers: all possible answers, in the file's order.

    Raises:
        DatasetError: a file is missing or of another format.
    """

    def __init__(self, path: str | Path, split: str = "test", *, distance: int = 20) -> None:
        super().__init__(path, Path(path) / split)
        self.store = FileStore(path)
        name = self.store.find(f"{split}/questions.json")
        self._folder = name[: -len("questions.json")] + "images/"
        self.distance = distance
        self.answers = self.store.text(self.store.find("answers.txt")).split()
        content = parse_json(self.store.text(name), self.store.path / name)
        try:
            self._rows = [(str(question), str(answer), int(image)) for question, answer, image in content]
        except (TypeError, ValueError, OverflowError) as error:
            raise DatasetError(
                f"{self.store.path / name} is not a list of question, answer, image number: {error}"
            ) from error

    def __len__(self) -> int:
        return len(self._rows)

    def load(self, index: int) -> QuestionExample:
        question, answer, number = self._rows[index]
        image = self.store.image(f"{self._folder}{number}.png")
        return QuestionExample(f"{number}:{index}", image, question, answer, shape_mask(image, self.distance))


def shape_mask(image: np.ndarray, distance: int = 20) -> np.ndarray:
    """Pixels that differ from the most frequent colour, (H, W) booleans."""
    colours, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    background = colours[counts.argmax()].astype(int)
    return np.abs(image.astype(int) - background).max(axis=2) > distance
