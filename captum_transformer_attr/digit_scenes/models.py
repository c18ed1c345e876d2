"""The two tiny transformers trained on digit scenes, as unmodified timm models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from captum_transformer_attr.output_files import write_files

if TYPE_CHECKING:
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import VisionTransformer

Architecture = Literal["vit", "swin"]


@dataclass(frozen=True)
class ModelInfo:
    """What a digit-scene checkpoint says about itself.

    Attributes:
        architecture: ``"vit"`` (timm ``VisionTransformer``) or ``"swin"`` (timm ``SwinTransformer``).
        kwargs: constructor arguments of the timm class.
        mean: per-channel mean that is subtracted from images in [0, 1].
        std: per-channel divisor applied after the mean.
        class_names: name of each logit.
        training: how the weights came about (seed, number of images, ...).
        metrics: accuracy on held-out writers.
    """

    architecture: Architecture
    kwargs: dict[str, Any]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    class_names: tuple[str, ...]
    training: dict[str, Any]
    metrics: dict[str, float]

    def normalize(self, images: Tensor) -> Tensor:
        """Model input for images ``(..., 3, H, W)`` in [0, 1]."""
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


def load_vit() -> VisionTransformer:
    """ViT with a class token, a convolutional stem to 16 x 16 tokens and 4 blocks.

    It has 10 independent logits, one per digit. Input is ``(N, 3, 64, 64)``, normalised by
    :meth:`ModelInfo.normalize` of ``model_info("vit")``. The weights are float32 and frozen, the model is in eval mode.
    ``model.pretrained_cfg`` holds size, mean, std and label names where timm's own models have them.

    Raises:
        ImportError: timm or safetensors is not installed (``pip install 'captum-transformer-attr[vision]'``).
    """
    return _load("vit")


def load_swin() -> SwinTransformer:
    """Swin with 4-pixel patches, windows of 4 x 4 tokens with shifts, and stages of 16 x 16, 8 x 8 and 4 x 4 tokens.

    Otherwise as :func:`load_vit`.
    """
    return _load("swin")


def model_info(architecture: Architecture) -> ModelInfo:
    """Metadata of the shipped checkpoint, read without building the model.

    Raises:
        ValueError: unknown architecture.
        ImportError: safetensors is not installed (``pip install 'captum-transformer-attr[vision]'``).
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(_MISSING.format("safetensors")) from error
    with safe_open(checkpoint_path(architecture), "pt") as file:
        fields = {key: json.loads(value) for key, value in file.metadata().items()}
    fields.update({key: tuple(fields[key]) for key in ("mean", "std", "class_names")})
    return ModelInfo(**fields)


def checkpoint_path(architecture: Architecture) -> Path:
    """Path of the shipped safetensors file.

    Raises:
        ValueError: unknown architecture.
    """
    if architecture not in ("vit", "swin"):
        raise ValueError(f"architecture must be 'vit' or 'swin', got {architecture!r}")
    return Path(__file__).with_name(f"{architecture}.safetensors")


def build(architecture: Architecture, kwargs: Mapping[str, Any]) -> Any:
    """Untrained timm ``VisionTransformer`` or ``SwinTransformer``.

    Args:
        architecture: ``"vit"`` or ``"swin"``.
        kwargs: of the timm class; ``stem`` gives a ViT timm's convolutional stem (``ConvStem`` in a ``HybridEmbed``) in
            place of the patch embedding.

    Raises:
        ImportError: timm is not installed (``pip install 'captum-transformer-attr[vision]'``).
    """
    try:
        from timm.layers import BatchNormAct2d, HybridEmbed
        from timm.models.swin_transformer import SwinTransformer
        from timm.models.vision_transformer import VisionTransformer
        from timm.models.vision_transformer_hybrid import ConvStem
    except ImportError as error:
        raise ImportError(_MISSING.format("timm")) from error
    arguments = dict(kwargs)
    stem = arguments.pop("stem", None)
    if stem is not None:
        backbone = ConvStem(**stem, norm_layer=partial(BatchNormAct2d, act_layer=nn.ReLU), act_layer=nn.ReLU)
        arguments["embed_layer"] = partial(HybridEmbed, backbone=backbone, proj=False)
    return (VisionTransformer if architecture == "vit" else SwinTransformer)(**arguments)


def save(model: nn.Module, info: ModelInfo, path: Path) -> None:
    """Write weights, rounded to float16, and metadata; the file appears complete or not at all.

    Raises:
        OSError: the folder of ``path`` cannot be written.
    """
    from safetensors.torch import save_file

    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    metadata = {key: json.dumps(value) for key, value in vars(info).items()}
    write_files({path: lambda temporary: save_file(weights, temporary, metadata=metadata)})


def _load(architecture: Architecture) -> Any:
    info = model_info(architecture)
    from safetensors.torch import load_file

    weights = load_file(checkpoint_path(architecture))
    model = build(architecture, info.kwargs)
    model.load_state_dict({name: value.float() for name, value in weights.items()}, strict=True)
    size = info.kwargs["img_size"]
    model.pretrained_cfg = {
        "architecture": f"digit_scenes_{architecture}",
        "num_classes": len(info.class_names),
        "input_size": (3, size, size),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": info.mean,
        "std": info.std,
        "label_names": info.class_names,
    }
    return model.eval().requires_grad_(False)


_MISSING = "the embedded models need {}: pip install 'captum-transformer-attr[vision]'"
