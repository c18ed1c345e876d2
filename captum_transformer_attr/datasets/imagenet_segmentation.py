"""ImageNet-Segmentation (Guillaumin, Küttel, Ferrari, IJCV 2014), the file `gtsegs_ijcv.mat`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from captum_transformer_attr.datasets.errors import DatasetError
from captum_transformer_attr.datasets.examples import ImageExample, Region
from captum_transformer_attr.datasets.files import check_file
from captum_transformer_attr.datasets.reader import Reader


class ImageNetSegmentation(Reader[ImageExample]):
    """4,276 images of 445 classes, each with one foreground mask; the data set of the segmentation tables of CVPR 2021.

    Args:
        path: `gtsegs_ijcv.mat`, a MATLAB 7.3 (HDF5) file: `value/img` and `value/gt` hold references to the images,
            stored channels first with both axes exchanged, and to cells with the masks. Needs h5py.

    Raises:
        DatasetError: the file is missing, damaged, or has another content.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.path = Path(path)
        check_file(self.path)
        try:
            import h5py
        except ImportError:
            raise DatasetError(f"reading {path} needs h5py: pip install h5py") from None
        try:
            self._file: Any = h5py.File(self.path, "r")
            self._images, self._masks = self._file["value/img"], self._file["value/gt"]
            if not all(isinstance(part, h5py.Dataset) and part.ndim == 2 for part in (self._images, self._masks)):
                raise KeyError("value/img and value/gt are no tables of references")
        except (OSError, KeyError, RuntimeError) as error:
            raise DatasetError(f"{path} is not a readable gtsegs_ijcv.mat: {error}") from error
        if len(self._images) != len(self._masks):
            raise DatasetError(f"{path} has {len(self._images)} images and {len(self._masks)} masks")

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> ImageExample:
        name = f"{self.path.name}:{index}"
        try:
            image = np.array(self._file[self._images[index, 0]]).transpose(2, 1, 0)
            cell = self._file[self._masks[index, 0]]
            mask = np.array(self._file[cell[0, 0]]).transpose(1, 0).astype(bool)
        except (OSError, KeyError, ValueError, IndexError, AttributeError, TypeError, RuntimeError) as error:
            raise DatasetError(f"image {index} of {self.path} cannot be read: {error}") from error
        if image.shape != (*mask.shape, 3):
            raise DatasetError(f"image {index} of {self.path}: image {image.shape} does not fit mask {mask.shape}")
        return ImageExample(name, image.astype(np.uint8), None, (Region(mask=mask),))
