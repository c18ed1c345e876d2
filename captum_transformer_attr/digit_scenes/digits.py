"""The 1,797 real handwritten digits of scikit-learn, split by writer."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Split = Literal["train", "test"]

# The file names no writers, but is stored writer by writer: each starts with the sequence 0..9 twice. 1415 is such a
# start, so the last 382 digits come from people of whom no digit is in the training part.
FIRST_TEST_DIGIT = 1415


def load_digit_images(split: Split) -> tuple[Tensor, Tensor]:
    """Handwritten digits of one split.

    Source: Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998 (CC BY 4.0), in the
    copy that scikit-learn installs with itself; nothing is downloaded.

    Args:
        split: ``"train"`` (1,415 digits) or ``"test"`` (382 digits of other writers).

    Returns:
        Images ``(D, 8, 8)``, float32 in [0, 1], 1 is full ink; and classes ``(D,)``, int64 in 0..9.

    Raises:
        ValueError: unknown split.
        ImportError: scikit-learn is not installed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    images, classes = _all_digits()
    part = slice(None, FIRST_TEST_DIGIT) if split == "train" else slice(FIRST_TEST_DIGIT, None)
    return images[part].clone(), classes[part].clone()


@lru_cache(maxsize=1)
def _all_digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "digit scenes need scikit-learn's handwritten digits: pip install 'captum-transformer-attr[cli]'"
        ) from error
    digits = load_digits()
    return torch.from_numpy(digits.images / 16.0).float(), torch.from_numpy(digits.target).long()
