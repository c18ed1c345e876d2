"""From WordNet ids to the class indices of ImageNet-1k."""

from __future__ import annotations

from captum_transformer_attr.datasets.errors import DatasetError


def imagenet_classes() -> list[str]:
    """The 1000 WordNet ids of ILSVRC 2012 in the order of the class indices (sorted), from timm.

    Raises:
        DatasetError: timm is not installed.
    """
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        raise DatasetError(
            "the class order of ImageNet-1k is taken from timm: pip install timm, or give the WordNet ids yourself"
        ) from None
    return list(ImageNetInfo().label_names())
