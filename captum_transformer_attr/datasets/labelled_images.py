"""A flat folder of images with a `labels.json`: file name to class index and class name."""

from __future__ import annotations

from pathlib import Path

from captum_transformer_attr.datasets.errors import DatasetError
from captum_transformer_attr.datasets.examples import ImageExample
from captum_transformer_attr.datasets.files import FileStore, parse_json
from captum_transformer_attr.datasets.reader import Reader


class LabelledImages(Reader[ImageExample]):
    """Images named in `labels.json`, `{"file.jpg": {"class_index": 3, "name": "tiger shark"}, ...}`.

    The format of one-image-per-class collections of ImageNet; your own images fit it with a few lines.

    Args:
        path: folder or archive.

    Raises:
        DatasetError: `labels.json` is missing or of another format.
    """

    has_regions = False

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.store = FileStore(path)
        index = self.store.find("labels.json")
        self._folder = "" if "/" not in index else index.rsplit("/", 1)[0] + "/"
        labels = parse_json(self.store.text(index), self.store.path / index)
        try:
            self._entries = [(str(name), int(entry["class_index"])) for name, entry in sorted(labels.items())]
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise DatasetError(
                f"{self.store.path / index} must map every file name to an object with an integer class_index"
            ) from error

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, index: int) -> ImageExample:
        name, label = self._entries[index]
        return ImageExample(name, self.store.image(self._folder + name), label)
