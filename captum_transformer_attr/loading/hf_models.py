"""Models of Hugging Face transformers, from a folder or by their name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from captum_transformer_attr.loading.checkpoints import load_weights
from captum_transformer_attr.loading.errors import LoadingError, first_line
from captum_transformer_attr.loading.images import ImagePreprocessing, PreprocessingOptions, plain_preprocessing
from captum_transformer_attr.loading.models import ImageModel, LoadedModel, TextModel

IMAGE_HEADS = ("ForImageClassification", "ForImageClassificationWithTeacher")
TEXT_HEADS = ("ForSequenceClassification",)


def load_hf(
    name: str,
    checkpoint: str | Path | None = None,
    options: PreprocessingOptions | None = None,
    *,
    class_count: int | None = None,
    random_weights: bool = False,
) -> LoadedModel:
    """A classifier of images or texts.

    The class is the one its ``config.json`` names; weights are read as float32.

    Args:
        name: A folder with ``config.json`` (and weights, tokenizer or image processor), or a name on the hub, which
            is looked up in the local cache first.
        checkpoint: Local weights instead of those of the folder.
        options: Preprocessing to use instead of the model's own.
        class_count: Number of outputs, where the weights have another number than the configuration says.
        random_weights: Load no weights at all.

    Raises:
        LoadingError: if the model, its tokenizer or its processor cannot be had, the weights do not fit, or its class
            is none that is supported here.
    """
    config = read_config(name)
    if class_count is not None:
        config.num_labels = class_count
    model_class, head = _model_class(name, config)
    if checkpoint is not None or random_weights:
        model = model_class(config)
        if checkpoint is not None:
            load_weights(model, checkpoint)
    else:
        model = _pretrained(model_class, name, config)
    model.eval()
    names = _class_names(config)
    multi_label = getattr(config, "problem_type", None) == "multi_label_classification"
    if head in IMAGE_HEADS:
        return ImageModel(name, model, names, multi_label, _preprocessing(name, config, options))
    return TextModel(name, model, names, multi_label, _tokenizer(name))


def read_config(name: str) -> Any:
    """The configuration of a folder or of a model on the hub.

    Raises:
        LoadingError: if there is none.
    """
    from transformers import AutoConfig

    path = Path(name)
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or len(path.parts) > 2):
        raise LoadingError(f"model {name}: there is no such folder or file")
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # a missing folder, a missing network and a broken file raise different classes
        if Path(name).is_dir():
            raise LoadingError(f"folder {name} holds no readable config.json: {first_line(error)}") from error
        raise LoadingError(
            f"model {name!r} is no timm architecture, no folder, and cannot be had from the Hugging Face hub "
            f"({first_line(error)})"
        ) from error


def _model_class(name: str, config: Any) -> tuple[Any, str]:
    """The class that the configuration names, and which supported head it has."""
    import transformers

    architecture = (getattr(config, "architectures", None) or [""])[0]
    for head in (*IMAGE_HEADS, *TEXT_HEADS):
        if architecture.endswith(head) and hasattr(transformers, architecture):
            return getattr(transformers, architecture), head
    supported = ", ".join(f"…{head}" for head in (*IMAGE_HEADS, *TEXT_HEADS))
    raise LoadingError(
        f"model {name}: explaining {architecture or 'a model without a head'} from the command line is not supported "
        f"(supported: {supported}); use the classes from Python"
    )


def _pretrained(model_class: Any, name: str, config: Any) -> nn.Module:
    try:
        with _quiet():
            model, info = model_class.from_pretrained(
                name, config=config, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:
        raise LoadingError(f"weights of {name} cannot be loaded: {first_line(error)}") from error
    # transformers would go on with random values here, and every explanation would be of noise.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise LoadingError(
            f"weights of {name} do not fit {model_class.__name__}: {len(missing)} missing, e.g. {missing[0]}"
        )
    return model


class _quiet:
    """Silence transformers' loading reports: what is wrong is raised by us, in one line."""

    def __enter__(self) -> None:
        from transformers.utils import logging as transformers_logging

        self.logging = transformers_logging
        self.verbosity = transformers_logging.get_verbosity()
        self.progress = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity(logging.CRITICAL)
        transformers_logging.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        self.logging.set_verbosity(self.verbosity)
        if self.progress:
            self.logging.enable_progress_bar()


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise LoadingError(f"tokenizer of {name} cannot be loaded: {first_line(error)}") from error


def _preprocessing(name: str, config: Any, options: PreprocessingOptions | None) -> ImagePreprocessing:
    """The model's own image processor with the user's changes, or the user's values alone where it has none."""
    from transformers import AutoImageProcessor

    options = options or PreprocessingOptions()
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except Exception as error:
        size = options.size or _configured_size(config)
        if options.mean is None or options.std is None or size is None:
            raise LoadingError(
                f"image processor of {name} cannot be loaded ({first_line(error)}); give --size, --mean and --std"
            ) from error
        return plain_preprocessing(size, options.mean, options.std, squash=options.squash)
    changed: dict[str, Any] = {}
    if options.size is not None:
        height, width = options.size
        changed["size"] = {"height": height, "width": width}
        changed["crop_size"] = {"height": height, "width": width}
    elif options.squash:
        changed["size"] = dict(getattr(processor, "crop_size", None) or processor.size)
    if options.size is not None or options.squash:
        changed["do_center_crop"] = False
    mean = tuple(options.mean or processor.image_mean)
    std = tuple(options.std or processor.image_std)

    def transform(image: Any) -> torch.Tensor:
        values = processor(image, return_tensors="pt", image_mean=list(mean), image_std=list(std), **changed)
        return values["pixel_values"][0]

    return ImagePreprocessing(transform, mean, std)


def _configured_size(config: Any) -> tuple[int, int] | None:
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return size, size
    return None if size is None else (int(size[0]), int(size[1]))


def _class_names(config: Any) -> tuple[str, ...] | None:
    names = getattr(config, "id2label", None)
    if not names or len(names) != config.num_labels:
        return None
    ordered = tuple(str(names[index]) for index in range(len(names)))
    # transformers' placeholder for models that have no names.
    return None if all(name == f"LABEL_{index}" for index, name in enumerate(ordered)) else ordered
