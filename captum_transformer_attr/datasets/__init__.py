"""Readers for the data sets of the papers, in their official formats, from folders the user has.

Nothing is downloaded; `docs/datasets.md` says where each can be had.
"""

from captum_transformer_attr.datasets.boxed_images import BoxedImages
from captum_transformer_attr.datasets.coco import CocoInstances
from captum_transformer_attr.datasets.easy_vqa import EasyVqa
from captum_transformer_attr.datasets.eraser import Eraser
from captum_transformer_attr.datasets.errors import DatasetError
from captum_transformer_attr.datasets.examples import ImageExample, QuestionExample, Region, TextExample
from captum_transformer_attr.datasets.imagenet import ImageNetValidation
from captum_transformer_attr.datasets.imagenet_segmentation import ImageNetSegmentation
from captum_transformer_attr.datasets.labelled_images import LabelledImages
from captum_transformer_attr.datasets.reader import Joined, Reader, Skipped
from captum_transformer_attr.datasets.sst import Sst2, SstRationales
from captum_transformer_attr.datasets.tiny_imagenet import TinyImageNetValidation

__all__ = [
    "BoxedImages",
    "CocoInstances",
    "DatasetError",
    "EasyVqa",
    "Eraser",
    "ImageExample",
    "ImageNetSegmentation",
    "ImageNetValidation",
    "Joined",
    "LabelledImages",
    "QuestionExample",
    "Reader",
    "Region",
    "Skipped",
    "Sst2",
    "SstRationales",
    "TextExample",
    "TinyImageNetValidation",
]
