"""A model without its weights and an input that it accepts: enough to see which operations it is made of."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_transformer_attr.loading.errors import LoadingError, first_line
from captum_transformer_attr.loading.hf_models import read_config
from captum_transformer_attr.loading.images import PreprocessingOptions
from captum_transformer_attr.loading.models import ImageModel
from captum_transformer_attr.loading.resolve import EMBEDDED, load_model
from captum_transformer_attr.loading.timm_models import is_timm_name

TOKENS = 12
AUDIO_SAMPLES = 8000


def model_with_sample(
    spec: str, options: PreprocessingOptions | None = None, *, class_count: int | None = None
) -> tuple[nn.Module, Any]:
    """A randomly initialised model and random inputs for it.

    Args:
        spec: As for :func:`~captum_transformer_attr.loading.load_model`; of a Hugging Face model only ``config.json``
            is read, and its class may be any.
        options: Input size, for images.
        class_count: Number of outputs.

    Returns:
        The model in eval mode, and a batch of one as it takes it: images, or a mapping.

    Raises:
        LoadingError: if the model cannot be built, or takes inputs that cannot be made up.
    """
    generator = torch.Generator().manual_seed(0)
    path = Path(spec)
    if spec in EMBEDDED or path.is_file() or (not path.is_dir() and is_timm_name(spec)):
        loaded = load_model(spec, options=options, class_count=class_count, random_weights=True)
        assert isinstance(loaded, ImageModel)
        from PIL import Image

        noise = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8)
        return loaded.model, loaded.preprocessing(Image.fromarray(noise.numpy()))[None]
    config = read_config(spec)
    if class_count is not None:
        config.num_labels = class_count
    model = _build(spec, config)
    return model, _inputs(spec, model, config, options, generator)


def _build(name: str, config: Any) -> nn.Module:
    import transformers

    architecture = (getattr(config, "architectures", None) or [""])[0]
    try:
        if hasattr(transformers, architecture):
            model = getattr(transformers, architecture)(config)
        else:
            model = transformers.AutoModel.from_config(config)
    except Exception as error:  # each architecture checks its configuration in its own way
        raise LoadingError(f"model {name} cannot be built from its configuration: {first_line(error)}") from error
    return model.eval()


def _inputs(
    name: str, model: nn.Module, config: Any, options: PreprocessingOptions | None, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random values for the arguments that the model's forward names."""
    arguments = inspect.signature(model.forward).parameters
    inputs: dict[str, Tensor] = {}
    if "pixel_values" in arguments:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 224
        height, width = (options.size if options and options.size else None) or (
            (size, size) if isinstance(size, int) else tuple(size)
        )
        channels = getattr(vision, "num_channels", 3)
        inputs["pixel_values"] = torch.rand(1, channels, height, width, generator=generator)
    for key in ("input_ids", "decoder_input_ids"):
        if key in arguments:
            vocabulary = getattr(getattr(config, "text_config", config), "vocab_size", 0)
            inputs[key] = torch.randint(0, max(vocabulary, 1), (1, TOKENS), generator=generator)
    if "input_ids" in inputs and "attention_mask" in arguments:
        inputs["attention_mask"] = torch.ones(1, TOKENS, dtype=torch.long)
    if "input_values" in arguments:
        inputs["input_values"] = torch.randn(1, AUDIO_SAMPLES, generator=generator)
    if "input_features" in arguments:
        frames = 2 * getattr(config, "max_source_positions", 1500)
        inputs["input_features"] = torch.randn(1, getattr(config, "num_mel_bins", 80), frames, generator=generator)
    if not inputs:
        raise LoadingError(f"model {name} takes {', '.join(arguments)}, for which no sample can be made up; use Python")
    return inputs
