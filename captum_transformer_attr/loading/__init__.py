"""Loading models, weights, pictures and labels for the command line; every failure is one line."""

from captum_transformer_attr.loading.checkpoints import load_weights, read_weights
from captum_transformer_attr.loading.errors import LoadingError
from captum_transformer_attr.loading.images import ImagePreprocessing, PreprocessingOptions, read_image
from captum_transformer_attr.loading.labels import class_index, read_labels, short_name
from captum_transformer_attr.loading.models import (
    AnswerModel,
    DetectionModel,
    ImageModel,
    LanguageModel,
    LoadedModel,
    PairModel,
    RegionAnswerModel,
    TextModel,
)
from captum_transformer_attr.loading.resolve import load_model
from captum_transformer_attr.loading.words import merge_pieces, words_of

__all__ = [
    "AnswerModel",
    "DetectionModel",
    "ImageModel",
    "ImagePreprocessing",
    "LanguageModel",
    "LoadedModel",
    "LoadingError",
    "PairModel",
    "PreprocessingOptions",
    "RegionAnswerModel",
    "TextModel",
    "class_index",
    "load_model",
    "load_weights",
    "merge_pieces",
    "read_image",
    "read_labels",
    "read_weights",
    "short_name",
    "words_of",
]
