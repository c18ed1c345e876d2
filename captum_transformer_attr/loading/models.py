"""What a loaded model is to the rest of the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_transformer_attr.loading.errors import LoadingError
from captum_transformer_attr.loading.images import ImagePreprocessing


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with what is needed to feed it and to name its outputs.

    Attributes:
        name: How the user called it.
        model: The module itself, untouched.
        class_names: Name of each output, or None.
        multi_label: Whether outputs are independent (sigmoid) instead of exclusive (softmax).
    """

    name: str
    model: nn.Module
    class_names: tuple[str, ...] | None
    multi_label: bool

    def to(self, device: torch.device, dtype: torch.dtype | None) -> LoadedModel:
        """The same with the model moved; ``dtype`` None keeps its own."""
        return replace(self, model=self.model.to(device=device, dtype=dtype))

    def with_labels(self, names: tuple[str, ...] | None) -> LoadedModel:
        """The same with other class names, if any are given."""
        return self if names is None else replace(self, class_names=names)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each class, from logits ``(N, C)``."""
        return logits.sigmoid() if self.multi_label else logits.softmax(-1)


@dataclass(frozen=True)
class ImageModel(LoadedModel):
    """A classifier of images; its input is ``(N, 3, H, W)``."""

    preprocessing: ImagePreprocessing


@dataclass(frozen=True)
class TextModel(LoadedModel):
    """A classifier of texts; its input is what the tokenizer returns."""

    tokenizer: Callable[..., Any]


@dataclass(frozen=True)
class DetectionModel(LoadedModel):
    """A detector with one row of class logits per query, ``(N, queries, classes + 1)``; the last class is "nothing"."""

    preprocessing: ImagePreprocessing


@dataclass(frozen=True)
class LanguageModel(LoadedModel):
    """A causal or encoder-decoder language model; its output is ``(N, T, vocabulary)``."""

    tokenizer: Callable[..., Any]

    @property
    def has_encoder(self) -> bool:
        """Whether the text is read by an encoder, and the answer written by a decoder."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))


@dataclass(frozen=True)
class AnswerModel(LoadedModel):
    """A classifier of answers to a question about an image."""

    preprocessing: ImagePreprocessing
    tokenizer: Callable[..., Any]


@dataclass(frozen=True)
class RegionAnswerModel(LoadedModel):
    """A classifier of answers to a question about image regions whose features a detector made (LXMERT, VisualBERT)."""

    tokenizer: Callable[..., Any]

    @property
    def reads_boxes(self) -> bool:
        """Whether the regions' boxes are an input as well; otherwise the features alone."""
        return bool(self._config.model_type == "lxmert")

    @property
    def features(self) -> tuple[str, int]:
        """Name of the features' input and their number per region."""
        if self.reads_boxes:
            return "visual_feats", self._config.visual_feat_dim
        return "visual_embeds", self._config.visual_embedding_dim

    @property
    def _config(self) -> Any:
        return self.model.config


@dataclass(frozen=True)
class PairModel(LoadedModel):
    """A contrastive model: how well an image and a text fit, ``(images, texts)``."""

    preprocessing: ImagePreprocessing
    tokenizer: Callable[..., Any]


def check_finite(model: nn.Module, name: str) -> None:
    """Refuse weights that no output can come from.

    Raises:
        LoadingError: naming the first parameter that holds NaN or infinite values.
    """
    for key, value in model.named_parameters():
        if not value.isfinite().all():
            raise LoadingError(f"model {name}: parameter {key} holds NaN or infinite values")
