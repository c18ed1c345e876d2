"""Digit scenes: real handwritten digits on a cluttered canvas, with exact masks, and two tiny transformers for them."""

from captum_transformer_attr.digit_scenes.digits import load_digit_images
from captum_transformer_attr.digit_scenes.models import ModelInfo, checkpoint_path, load_swin, load_vit, model_info
from captum_transformer_attr.digit_scenes.scenes import CANVAS_SIZE, CLASS_NAMES, DigitScenes, make_scenes

__all__ = [
    "CANVAS_SIZE",
    "CLASS_NAMES",
    "DigitScenes",
    "ModelInfo",
    "checkpoint_path",
    "load_digit_images",
    "load_swin",
    "load_vit",
    "make_scenes",
    "model_info",
]
