"""What feeds a Hugging Face model: its tokenizer, its image processor, the names of its classes."""

from __future__ import annotations

from typing import Any

import torch

from captum_transformer_attr.loading.errors import LoadingError, first_line
from captum_transformer_attr.loading.images import ImagePreprocessing, PreprocessingOptions, plain_preprocessing


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a folder or a model on the hub.

    Raises:
        LoadingError: if there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise LoadingError(f"tokenizer of {name} cannot be loaded: {first_line(error)}") from error


def preprocessing_of(name: str, config: Any, options: PreprocessingOptions | None) -> ImagePreprocessing:
    """The model's own image processor with the user's changes, or the user's values alone where it has none.

    Raises:
        LoadingError: if it has none and the user's values do not suffice.
    """
    from transformers import AutoImageProcessor

    options = options or PreprocessingOptions()
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except Exception as error:
        size = options.size or _configured_size(getattr(config, "vision_config", config))
        if options.mean is None or options.std is None or size is None:
            raise LoadingError(
                f"image processor of {name} cannot be loaded ({first_line(error)}); give --size, --mean and --std"
            ) from error
        return plain_preprocessing(size, options.mean, options.std, squash=options.squash)
    changed: dict[str, Any] = {}
    if options.size is not None or options.squash:
        size = options.size or _processor_size(processor)
        changed = {"size": {"height": size[0], "width": size[1]}, "do_center_crop": False}
    mean = tuple(options.mean or getattr(processor, "image_mean", None) or (0.0, 0.0, 0.0))
    std = tuple(options.std or getattr(processor, "image_std", None) or (1.0, 1.0, 1.0))

    def transform(image: Any) -> torch.Tensor:
        values = processor(image, return_tensors="pt", image_mean=list(mean), image_std=list(std), **changed)
        return values["pixel_values"][0]

    return ImagePreprocessing(transform, mean, std)


def class_names_of(config: Any) -> tuple[str, ...] | None:
    """Names of the outputs from ``id2label``; None where there are only placeholders."""
    names = getattr(config, "id2label", None)
    if not names or len(names) != config.num_labels:
        return None
    ordered = tuple(str(names[index]) for index in range(len(names)))
    return None if all(name == f"LABEL_{index}" for index, name in enumerate(ordered)) else ordered


def _processor_size(processor: Any) -> tuple[int, int]:
    size: dict[str, Any] = dict(getattr(processor, "crop_size", None) or processor.size)
    side: Any = size.get("shortest_edge") or size.get("longest_edge")
    return int(size.get("height") or side), int(size.get("width") or side)


def _configured_size(config: Any) -> tuple[int, int] | None:
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return size, size
    return None if size is None else (int(size[0]), int(size[1]))
