"""Image classifiers of timm, with preprocessing and labels from their own configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from captum_transformer_attr.loading.checkpoints import load_weights, read_description
from captum_transformer_attr.loading.errors import LoadingError, first_line
from captum_transformer_attr.loading.images import ImagePreprocessing, PreprocessingOptions
from captum_transformer_attr.loading.models import ImageModel


def is_timm_name(name: str) -> bool:
    """Whether timm knows an architecture of this name, e.g. ``vit_tiny_patch16_224`` or ``….augreg_in21k``."""
    try:
        import timm
    except ImportError:
        return False
    return timm.is_model(name.removeprefix("timm/"))


def load_timm(
    name: str,
    checkpoint: str | Path | None = None,
    options: PreprocessingOptions | None = None,
    *,
    class_count: int | None = None,
    random_weights: bool = False,
) -> ImageModel:
    """A timm model with its pretrained weights, or with those of a local file.

    Args:
        name: timm's name of the architecture.
        checkpoint: Local weights; without them timm's own are taken, from its cache or its hub.
        options: Preprocessing to use instead of the model's own.
        class_count: Number of outputs, where the weights have another number than timm's default.
        random_weights: Load no weights at all.

    Raises:
        LoadingError: if the weights cannot be had or do not fit.
    """
    import timm

    name = name.removeprefix("timm/")
    arguments: dict[str, Any] = {} if class_count is None else {"num_classes": class_count}
    pretrained = checkpoint is None and not random_weights
    try:
        model = timm.create_model(name, pretrained=pretrained, **arguments)
    except Exception as error:  # network, cache and constructor errors alike
        advice = "give its weights with --checkpoint" if pretrained else "check the name and the number of classes"
        raise LoadingError(f"timm model {name} cannot be loaded ({first_line(error)}); {advice}") from error
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return image_model(name, model, options)


def load_described(path: str | Path, options: PreprocessingOptions | None = None) -> ImageModel:
    """A timm model that its own safetensors file describes.

    The file's metadata holds ``model`` (``timm.models.<Class>``), ``kwargs``, and optionally ``classes``, ``mean``
    and ``std``, as JSON.

    Raises:
        LoadingError: if the description is missing or wrong, or the weights do not fit.
    """
    import timm.models

    description = read_description(path)
    class_path = str(description.get("model", ""))
    model_class = getattr(timm.models, class_path.removeprefix("timm.models."), None)
    if not class_path.startswith("timm.models.") or not isinstance(model_class, type):
        raise LoadingError(
            f"{path} does not say which timm class it holds; name the architecture with --model and this file with "
            "--checkpoint"
        )
    arguments = description.get("kwargs", {})
    try:
        model = model_class(**arguments)
    except TypeError as error:
        raise LoadingError(f"{path}: {class_path} cannot be built from its description: {first_line(error)}") from error
    load_weights(model, path)
    size = arguments.get("img_size", 224)
    model.pretrained_cfg = {
        "input_size": (3, *(size if isinstance(size, list) else (size, size))),
        "crop_pct": 1.0,
        "num_classes": arguments.get("num_classes", 1000),
        **{key: tuple(description[key]) for key in ("mean", "std") if key in description},
        **({"label_names": tuple(description["classes"])} if "classes" in description else {}),
    }
    return image_model(Path(path).name, model, options)


def image_model(
    name: str, model: Any, options: PreprocessingOptions | None = None, *, multi_label: bool = False
) -> ImageModel:
    """A timm model with everything its ``pretrained_cfg`` says.

    Args:
        name: How to call it.
        model: Any model with a ``pretrained_cfg``.
        options: Preprocessing to use instead of the model's own.
        multi_label: Whether its outputs are independent.
    """
    options = options or PreprocessingOptions()
    if options.size is not None and hasattr(model, "set_input_size"):
        # Resamples position embeddings, so that a ViT or Swin takes the size the user asks for.
        model.set_input_size(img_size=options.size)
    model.eval()
    return ImageModel(name, model, _class_names(model), multi_label, _preprocessing(model, options))


def _preprocessing(model: Any, options: PreprocessingOptions) -> ImagePreprocessing:
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config({}, model=model)
    changed = {
        "input_size": None if options.size is None else (3, *options.size),
        "mean": options.mean,
        "std": options.std,
        "crop_mode": "squash" if options.squash else None,
        "crop_pct": 1.0 if options.squash else None,
    }
    config.update({key: value for key, value in changed.items() if value is not None})
    transform = create_transform(**config, is_training=False)
    return ImagePreprocessing(transform, tuple(config["mean"]), tuple(config["std"]))


def _class_names(model: Any) -> tuple[str, ...] | None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    config: Any = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("label_names")
    if names:
        return tuple(names)
    subset = infer_imagenet_subset(model)
    return tuple(ImageNetInfo(subset).label_descriptions()) if subset else None
