"""Models of Hugging Face transformers, from a folder or by their name."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from captum_transformer_attr.loading.checkpoints import load_weights
from captum_transformer_attr.loading.errors import LoadingError, first_line
from captum_transformer_attr.loading.hf_inputs import class_names_of, preprocessing_of, tokenizer_of
from captum_transformer_attr.loading.images import PreprocessingOptions
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

KINDS: dict[str, type[LoadedModel]] = {
    "ForImageClassification": ImageModel,
    "ForImageClassificationWithTeacher": ImageModel,
    "ForSequenceClassification": TextModel,
    "ForObjectDetection": DetectionModel,
    "ForQuestionAnswering": AnswerModel,
    "QuestionAnswering": RegionAnswerModel,
    "ForCausalLM": LanguageModel,
    "LMHeadModel": LanguageModel,
    "ForConditionalGeneration": LanguageModel,
    "Model": PairModel,
}
"""Ends of class names -> what the command line makes of them, if the class takes the inputs of that kind."""
NEEDED_INPUTS: dict[type[LoadedModel], tuple[str, ...]] = {
    ImageModel: ("pixel_values",),
    TextModel: ("input_ids",),
    DetectionModel: ("pixel_values",),
    AnswerModel: ("pixel_values", "input_ids"),
    RegionAnswerModel: ("input_ids",),
    LanguageModel: ("input_ids",),
    PairModel: ("pixel_values", "input_ids"),
}


def load_hf(
    name: str,
    checkpoint: str | Path | None = None,
    options: PreprocessingOptions | None = None,
    *,
    class_count: int | None = None,
    random_weights: bool = False,
) -> LoadedModel:
    """A model with its tokenizer or image processor.

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
    model_class, kind = _model_class(name, config)
    if checkpoint is not None or random_weights:
        model = model_class(config)
        if checkpoint is not None:
            load_weights(model, checkpoint)
    else:
        model = _pretrained(model_class, name, config, class_count)
    sigmoid = "siglip" in config.model_type or getattr(config, "problem_type", None) == "multi_label_classification"
    common = (name, model.eval(), class_names_of(config), sigmoid)
    if kind in (ImageModel, DetectionModel):
        return kind(*common, preprocessing_of(name, config, options))
    if kind in (AnswerModel, PairModel):
        return kind(*common, preprocessing_of(name, config, options), tokenizer_of(name))
    return kind(*common, tokenizer_of(name))


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
        if path.is_dir():
            raise LoadingError(f"folder {name} holds no readable config.json: {first_line(error)}") from error
        raise LoadingError(
            f"model {name!r} is no timm architecture, no folder, and cannot be had from the Hugging Face hub "
            f"({first_line(error)})"
        ) from error


def _model_class(name: str, config: Any) -> tuple[Any, Any]:
    """The class that the configuration names, and which kind of model it is."""
    import transformers

    architecture = (getattr(config, "architectures", None) or [""])[0]
    model_class = getattr(transformers, architecture, None)
    for ending, kind in KINDS.items():
        if model_class is not None and architecture.endswith(ending) and _takes(model_class, kind):
            return model_class, kind
    raise LoadingError(
        f"model {name}: explaining {architecture or 'a model without a head'} from the command line is not supported "
        "(supported: classifiers of images and texts, detectors, language models, question answering on images or "
        "region features, pairs of image and text); use the classes from Python"
    )


def _takes(model_class: Any, kind: type[LoadedModel]) -> bool:
    """Whether a class takes the inputs of a kind, and no image where the kind has none."""
    arguments = inspect.signature(model_class.forward).parameters
    needed = NEEDED_INPUTS[kind]
    if kind is PairModel and "return_loss" not in arguments:  # contrastive models alone have this argument
        return False
    if kind is AnswerModel and "decoder_input_ids" in arguments:
        return False
    if kind is RegionAnswerModel and not {"visual_feats", "visual_embeds"} & set(arguments):
        return False
    allowed = "pixel_values" in needed or "pixel_values" not in arguments
    return allowed and all(key in arguments for key in needed)


def _pretrained(model_class: Any, name: str, config: Any, class_count: int | None) -> nn.Module:
    try:
        with _quiet():
            # Mismatches are ours to report: transformers' own error points to a table that is not shown.
            model, info = model_class.from_pretrained(
                name, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:
        raise LoadingError(f"weights of {name} cannot be loaded: {first_line(error)}") from error
    # transformers would go on with random values here, and every explanation would be of noise.
    if info["mismatched_keys"]:
        key, stored, built = sorted(info["mismatched_keys"])[0]
        cause = "" if class_count is None else f" with --num-classes {class_count}"
        raise LoadingError(
            f"weights of {name} do not fit {model_class.__name__}{cause}: "
            f"{key} is {tuple(stored)} instead of {tuple(built)}"
        )
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
