"""COCO instances (Lin et al., ECCV 2014): images with a mask for every object."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np

from captum_transformer_attr.datasets.errors import DatasetError
from captum_transformer_attr.datasets.examples import ImageExample, Region
from captum_transformer_attr.datasets.files import FileStore, check_file
from captum_transformer_attr.datasets.reader import Reader


class CocoInstances(Reader[ImageExample]):
    """The images of an instance annotation file, masks decoded by pycocotools.

    Args:
        images: folder (or archive) with the images, for example `val2017`.
        annotations: `instances_val2017.json`.
        crowds: keep regions that stand for a crowd of objects.

    Region labels are COCO's category ids (1 to 90, with gaps), as DETR's classes are.

    Raises:
        DatasetError: a file is missing or damaged, pycocotools is not installed.
    """

    def __init__(self, images: str | Path, annotations: str | Path, *, crowds: bool = False) -> None:
        super().__init__(images, annotations)
        try:
            from pycocotools.coco import COCO
        except ImportError:
            raise DatasetError("COCO annotations are read by pycocotools: pip install pycocotools") from None
        self.store = FileStore(images)
        check_file(annotations)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress by print()
                self.coco = COCO(str(annotations))
            self._images = [self.coco.imgs[key] for key in sorted(self.coco.imgs)]
            self._names = {category["id"]: category["name"] for category in self.coco.cats.values()}
            if not self._images or not all(isinstance(image["file_name"], str) for image in self._images):
                raise KeyError("images")
            self._sizes = [(int(image["height"]), int(image["width"])) for image in self._images]
        except Exception as error:  # whatever a damaged or foreign file makes pycocotools raise
            raise DatasetError(f"{annotations} is not a readable COCO instance file: {error!r}") from error
        self.crowds = crowds

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> ImageExample:
        entry = self._images[index]
        image = self.store.image(entry["file_name"])
        rows, columns = self._sizes[index]
        if image.shape[:2] != (rows, columns):
            size = f"{columns}x{rows}"
            raise DatasetError(f"{self.store.path / entry['file_name']} is not of the annotated size {size}")
        regions = []
        for annotation in self.coco.imgToAnns.get(entry["id"], []):
            if annotation.get("iscrowd") and not self.crowds:
                continue
            try:
                x, y, width, height = map(float, annotation["bbox"])
                mask = self.coco.annToMask(annotation).astype(bool)
                category = annotation["category_id"]
                name = self._names.get(category, "")
            except Exception as error:  # pycocotools checks nothing
                raise DatasetError(
                    f"annotation {annotation.get('id')} of {entry['file_name']} cannot be decoded: {error!r}"
                ) from error
            regions.append(Region(category, name, (x, y, x + width, y + height), mask))
        return ImageExample(entry["file_name"], np.ascontiguousarray(image), None, tuple(regions))
