"""A small CLIP for pictures of coloured shapes and their captions: drawings, model inputs and loader."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from benchmarks.trained_models.storage import find_checkpoint, load_model
from benchmarks.trained_models.vqa_models import build_tokenizer

CHECKPOINT_NAME = "clip_shapes"
COMMAND = "python -m benchmarks.trained_models.train_clip"
IMAGE_SIZE, PATCH_SIZE = 48, 6  # 64 patches, about nine of them on a shape
COLOURS = {"red": (220, 50, 40), "green": (50, 160, 60), "blue": (50, 90, 210), "yellow": (230, 190, 30)}
SHAPES = ("square", "disc", "triangle")
BACKGROUND = (240, 240, 235)

Thing = tuple[str, str]
THINGS: tuple[Thing, ...] = tuple(itertools.product(COLOURS, SHAPES))


@dataclass(frozen=True)
class Drawing:
    """A picture with its things.

    Attributes:
        image: ``IMAGE_SIZE`` pixels square, RGB.
        things: colour and shape of each.
        masks: ``(things, H, W)`` booleans, their pixels.
    """

    image: Image.Image
    things: tuple[Thing, ...]
    masks: np.ndarray


def draw(things: Sequence[Thing], rng: np.random.Generator) -> Drawing:
    """Up to four things, each somewhere in a quarter of its own."""
    half = IMAGE_SIZE // 2
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUND)
    masks = []
    quarters = rng.permutation(4)[: len(things)]
    for (colour, shape), quarter in zip(things, quarters, strict=True):
        size = int(rng.integers(13, 19))
        left, top = (int(corner * half + rng.integers(1, half - size)) for corner in (quarter % 2, quarter // 2))
        mask = Image.new("1", image.size)
        for canvas, ink in ((image, COLOURS[colour]), (mask, 1)):
            _draw_shape(ImageDraw.Draw(canvas), shape, (left, top, left + size, top + size), ink)
        masks.append(np.asarray(mask))
    return Drawing(image, tuple(things), np.stack(masks))


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], ink: object) -> None:
    left, top, right, bottom = box
    if shape == "square":
        pen.rectangle(box, fill=ink)  # type: ignore[arg-type]
    elif shape == "disc":
        pen.ellipse(box, fill=ink)  # type: ignore[arg-type]
    else:
        pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=ink)  # type: ignore[arg-type]


def caption(things: Sequence[Thing]) -> str:
    """For instance "a red disc and a blue square"."""
    return " and ".join(f"a {colour} {shape}" for colour, shape in things)


def random_things(rng: np.random.Generator) -> tuple[Thing, ...]:
    """One, two or three different things."""
    chosen = rng.permutation(len(THINGS))[: rng.integers(1, 4)]
    return tuple(THINGS[i] for i in chosen)


def pixels(drawings: Sequence[Drawing]) -> Tensor:
    """``(N, 3, IMAGE_SIZE, IMAGE_SIZE)`` in [-1, 1]."""
    arrays = np.stack([np.asarray(drawing.image) for drawing in drawings])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class TrainedClip:
    """The model (float32, eval mode) and its tokenizer."""

    model: CLIPModel
    tokenizer: PreTrainedTokenizerFast

    def inputs(self, drawings: Sequence[Drawing], texts: Sequence[str]) -> dict[str, Tensor]:
        """The model's keyword arguments."""
        text = self.tokenizer(list(texts), padding=True, return_tensors="pt", return_token_type_ids=False)
        return {"pixel_values": pixels(drawings), **text}


def tokenizer_of_captions() -> PreTrainedTokenizerFast:
    """Word by word; a text ends with [SEP], where CLIP reads it out."""
    return build_tokenizer([caption(THINGS)])


def build_model(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A randomly initialised small CLIP: 3 layers for pictures, 2 for texts."""
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    ids = {
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = dict(tower, vocab_size=len(tokenizer), max_position_embeddings=16, num_hidden_layers=2, **ids)
    vision = dict(tower, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, num_hidden_layers=3)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


def load_shape_clip() -> TrainedClip:
    """The CLIP trained on coloured shapes.

    Raises:
        MissingCheckpointError: it has not been trained; the message has the command.
    """
    folder = find_checkpoint(CHECKPOINT_NAME, COMMAND)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return TrainedClip(load_model(CLIPModel, folder), tokenizer)
