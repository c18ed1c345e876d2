"""Tiny ImageNet validation images (Stanford CS231n): 64 x 64 pixels, 200 classes, one box each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from captum_transformer_attr.datasets.errors import DatasetError
from captum_transformer_attr.datasets.examples import ImageExample, Region
from captum_transformer_attr.datasets.files import FileStore
from captum_transformer_attr.datasets.reader import Reader
from captum_transformer_attr.datasets.wordnet import imagenet_classes


class TinyImageNetValidation(Reader[ImageExample]):
    """The 10,000 validation images with labels and boxes.

    Args:
        path: the unpacked `tiny-imagenet-200`, its `val` folder, or an archive of either.
        wnids: WordNet ids in the order of the model's classes; by default that of ImageNet-1k, of which the 200
            classes are a part. An image of another class has no label.

    Raises:
        DatasetError: `val_annotations.txt` is missing or damaged (the line is named).
    """

    def __init__(self, path: str | Path, *, wnids: Sequence[str] | None = None) -> None:
        super().__init__(path)
        self.store = FileStore(path)
        name = self.store.find("val_annotations.txt")
        self._folder = name[: -len("val_annotations.txt")] + "images/"
        self.wnids = imagenet_classes() if wnids is None else list(wnids)
        index = {wnid: i for i, wnid in enumerate(self.wnids)}
        self._entries: list[tuple[str, Region]] = []
        for number, line in enumerate(self.store.text(name).splitlines(), 1):
            if not line.strip():
                continue
            fields = line.split("\t") if "\t" in line else line.split()
            try:
                file, wnid, (x0, y0, x1, y1) = fields[0], fields[1], map(int, fields[2:])
            except (ValueError, IndexError):
                raise DatasetError(
                    f"line {number} of {self.store.path / name} is not: file, WordNet id, x0, y0, x1, y1"
                ) from None
            # The file counts the last pixel in, our boxes end behind it.
            self._entries.append((file, Region(index.get(wnid), wnid, (x0, y0, x1 + 1, y1 + 1))))

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, index: int) -> ImageExample:
        name, region = self._entries[index]
        return ImageExample(name, self.store.image(self._folder + name), region.label, (region,))
