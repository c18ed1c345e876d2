"""ImageNet-1k validation images (Russakovsky et al., IJCV 2015) in the official layout or in folders per class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from captum_transformer_attr.datasets.errors import DatasetError
from captum_transformer_attr.datasets.examples import ImageExample, Region
from captum_transformer_attr.datasets.files import FileStore
from captum_transformer_attr.datasets.reader import Reader
from captum_transformer_attr.datasets.wordnet import imagenet_classes

_WNID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)
_SUFFIXES = (".jpeg", ".jpg", ".png")


class ImageNetValidation(Reader[ImageExample]):
    """The 50,000 validation images, or any part of them, with labels and, where given, boxes.

    Args:
        images: a folder with either the official flat `ILSVRC2012_val_00000001.JPEG`, ... (then `devkit` is needed), or
            one folder per WordNet id (`n01440764/...`), as torchvision and timm arrange them.
        devkit: the unpacked `ILSVRC2012_devkit_t12`, whose `data/meta.mat` and
            `data/ILSVRC2012_validation_ground_truth.txt` give the labels of the flat layout (needs scipy).
        boxes: folder with `ILSVRC2012_val_00000001.xml`, ... (`ILSVRC2012_bbox_val_v3`).
        wnids: the WordNet ids in the order of the model's classes; by default the usual order of ImageNet-1k, which is
            read off the devkit or taken from timm.

    Raises:
        DatasetError: the folder holds neither layout, the devkit is missing or damaged, a class folder is unknown.
    """

    def __init__(
        self,
        images: str | Path,
        *,
        devkit: str | Path | None = None,
        boxes: str | Path | None = None,
        wnids: Sequence[str] | None = None,
    ) -> None:
        super().__init__(*(path for path in (images, devkit, boxes) if path is not None))
        self.store = FileStore(images)
        self.has_regions = boxes is not None
        self.boxes = None if boxes is None else FileStore(boxes)
        names = [name for name in self.store.names() if name.lower().endswith(_SUFFIXES)]
        flat = [name for name in names if _NUMBER.fullmatch(name)]
        if flat:
            if devkit is None:
                raise DatasetError(f"{images} has images without class folders: give devkit (ILSVRC2012_devkit_t12)")
            labels, order = _devkit_labels(Path(devkit))
            self.wnids = list(wnids) if wnids is not None else order
            self._entries = [(name, _labelled(name, labels, devkit)) for name in flat]
        else:
            nested = [name for name in names if _WNID.fullmatch(Path(name).parent.name)]
            if not nested:
                raise DatasetError(f"{images} holds neither ILSVRC2012_val_*.JPEG nor folders named by WordNet id")
            self.wnids = list(wnids) if wnids is not None else imagenet_classes()
            self._entries = [(name, Path(name).parent.name) for name in nested]
        self._index = {wnid: index for index, wnid in enumerate(self.wnids)}
        unknown = sorted({wnid for _, wnid in self._entries} - set(self._index))
        if unknown:
            raise DatasetError(f"{images}: {unknown[0]} is not among the {len(self.wnids)} classes; give wnids")

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, index: int) -> ImageExample:
        name, wnid = self._entries[index]
        image = self.store.image(name)
        regions = () if self.boxes is None else _boxes(self.boxes, Path(name).stem + ".xml", self._index)
        return ImageExample(Path(name).name, image, self._index[wnid], regions)


def _devkit_labels(devkit: Path) -> tuple[list[str], list[str]]:
    """WordNet id of every validation image in the order of its number, and the classes in the usual order."""
    from scipy.io import loadmat

    meta, truth = devkit / "data" / "meta.mat", devkit / "data" / "ILSVRC2012_validation_ground_truth.txt"
    for path in (meta, truth):
        if not path.is_file():
            raise DatasetError(f"{path} does not exist; devkit must be the unpacked ILSVRC2012_devkit_t12")
    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"].reshape(-1)
        # Only leaves of the hierarchy are classes; the inner synsets follow them.
        by_number = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
        numbers = [int(line) for line in truth.read_text().split()]
        labels = [by_number[number] for number in numbers]
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise DatasetError(f"{devkit} cannot be read as an ILSVRC2012 devkit: {error!r}") from error
    return labels, sorted(by_number.values())


def _labelled(name: str, labels: list[str], devkit: Any) -> str:
    match = _NUMBER.fullmatch(name)
    number = int(match.group(1)) if match else 0
    if not 1 <= number <= len(labels):
        raise DatasetError(f"{name}: the ground truth in {devkit} has {len(labels)} lines")
    return labels[number - 1]


def _boxes(store: FileStore, name: str, index: dict[str, int]) -> tuple[Region, ...]:
    path = store.path / name
    try:
        tree = ElementTree.fromstring(store.read(name))
        regions = []
        for entry in tree.iter("object"):
            wnid = (entry.findtext("name") or "").strip()
            x0, y0, x1, y1 = (float(entry.findtext(f"bndbox/{k}") or "") for k in ("xmin", "ymin", "xmax", "ymax"))
            regions.append(Region(index.get(wnid), wnid, (x0, y0, x1, y1)))
    except (ElementTree.ParseError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path} is not a readable box annotation: {error}") from error
    return tuple(regions)
