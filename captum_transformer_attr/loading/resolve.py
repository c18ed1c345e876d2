"""From what the user writes after ``--model`` to a loaded model."""

from __future__ import annotations

from pathlib import Path

from captum_transformer_attr.loading.errors import LoadingError
from captum_transformer_attr.loading.hf_models import load_hf
from captum_transformer_attr.loading.images import PreprocessingOptions
from captum_transformer_attr.loading.models import LoadedModel, check_finite
from captum_transformer_attr.loading.timm_models import image_model, is_timm_name, load_described, load_timm

EMBEDDED = ("embedded", "embedded-swin")


def load_model(
    spec: str,
    checkpoint: str | Path | None = None,
    options: PreprocessingOptions | None = None,
    *,
    class_count: int | None = None,
    random_weights: bool = False,
) -> LoadedModel:
    """Load the model a user names.

    Args:
        spec: ``"embedded"`` or ``"embedded-swin"`` (the tiny models that come with the package), a timm name, a
            safetensors file that describes itself, a Hugging Face folder, or a Hugging Face name.
        checkpoint: Local weights, safetensors or a torch file that ``weights_only=True`` can read.
        options: Image preprocessing to use instead of the model's own.
        class_count: Number of outputs, where the checkpoint differs from the architecture's default.
        random_weights: Build the architecture without weights.

    Raises:
        LoadingError: one line that says what cannot be loaded, why, and what to do.
    """
    if not spec.strip():
        raise LoadingError("--model is empty: name a model or a folder")
    if spec in EMBEDDED:
        if class_count is not None:
            raise LoadingError(f"the {spec} model has 10 classes: leave out --num-classes, or name another --model")
        if checkpoint is not None:
            raise LoadingError("the embedded model brings its own weights: leave out --checkpoint, or name a --model")
        return _embedded(spec, options)
    loaded: LoadedModel
    path = Path(spec)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise LoadingError(f"--model {spec} is a file: name the architecture, and this file with --checkpoint")
        loaded = load_described(path, options)
    elif not path.is_dir() and is_timm_name(spec):
        loaded = load_timm(spec, checkpoint, options, class_count=class_count, random_weights=random_weights)
    else:
        loaded = load_hf(spec, checkpoint, options, class_count=class_count, random_weights=random_weights)
    check_finite(loaded.model, spec)
    return loaded


def _embedded(spec: str, options: PreprocessingOptions | None) -> LoadedModel:
    from captum_transformer_attr.digit_scenes import load_swin, load_vit

    model = load_vit() if spec == "embedded" else load_swin()
    return image_model(spec, model, options, multi_label=True)
