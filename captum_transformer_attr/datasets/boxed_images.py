"""Images in a zip archive with labels and boxes in a `validation.json`, as the project's Swin comes with."""

from __future__ import annotations

from pathlib import Path

from captum_transformer_attr.datasets.errors import DatasetError
from captum_transformer_attr.datasets.examples import ImageExample, Region
from captum_transformer_attr.datasets.files import FileStore, decode_text, parse_json, read_file
from captum_transformer_attr.datasets.reader import Reader


class BoxedImages(Reader[ImageExample]):
    """Images with one label and one box each.

    Args:
        images: archive or folder, `validation_images.zip`.
        index: `validation.json`: `{"classes": [{"wnid", "name"}, ...], "images": [{"file", "label", "box"}, ...]}` with
            boxes x0, y0, x1, y1 that count the last pixel in.

    Raises:
        DatasetError: a file is missing or of another format.
    """

    def __init__(self, images: str | Path, index: str | Path) -> None:
        super().__init__(images, index)
        self.store = FileStore(images)
        path = Path(index)
        content = parse_json(decode_text(read_file(path), path), path)
        try:
            self.classes = [str(entry["name"]) for entry in content["classes"]]
            self._entries: list[tuple[str, Region]] = []
            for entry in content["images"]:
                x0, y0, x1, y1 = map(float, entry["box"])
                label = int(entry["label"])
                region = Region(label, self.classes[label], (x0, y0, x1 + 1, y1 + 1))
                self._entries.append((str(entry["file"]), region))
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise DatasetError(f"{path} does not list classes and images with file, label, box: {error!r}") from error

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, index: int) -> ImageExample:
        name, region = self._entries[index]
        return ImageExample(name, self.store.image(name), region.label, (region,))
