"""The easy-VQA data set: images, questions, answers, patch features and the exact region of the shape.

easy-VQA (Victor Zhou, MIT) has 64x64 pictures of one coloured shape on a plain background and questions with 13
possible answers. As the background is one colour, the pixels of the shape are known exactly: `shape_mask`.

The archive ``easy_vqa/easy_vqa.tar.gz`` is read in place from the folder in the environment variable ``CTA_DATA``
(default: ``../shared/data`` beside the project).
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.data_folder import data_folder

IMAGE_SIZE = 64
GRID_SIZE = 8
PATCH_SIZE = IMAGE_SIZE // GRID_SIZE
FEATURE_DIM = 3 * PATCH_SIZE**2 + 2 * GRID_SIZE

Images = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EasyVqaSplit:
    """One split of easy-VQA.

    Attributes:
        images: ``(M, 64, 64, 3)``, values 0 to 255.
        questions: the text of every question.
        image_indices: ``(Q,)``, the row of ``images`` each question is about.
        answer_indices: ``(Q,)``, the position in ``answers`` of each right answer.
        answers: the 13 possible answers.
    """

    images: Images
    questions: list[str]
    image_indices: npt.NDArray[np.int64]
    answer_indices: npt.NDArray[np.int64]
    answers: list[str]

    def __len__(self) -> int:
        return len(self.questions)


def archive_path() -> Path:
    """Where the easy-VQA archive is expected; the file may be missing."""
    return data_folder() / "easy_vqa" / "easy_vqa.tar.gz"


def load_easy_vqa(split: Literal["train", "test"], archive: Path | None = None) -> EasyVqaSplit:
    """Reads one split of easy-VQA from its archive (about two seconds).

    Args:
        split: ``"train"`` (4,000 images) or ``"test"`` (1,000 images).
        archive: the ``.tar.gz``; default `archive_path`.

    Raises:
        FileNotFoundError: the archive is missing.
    """
    archive = archive or archive_path()
    if not archive.is_file():
        raise FileNotFoundError(f"easy-VQA archive not found: {archive} (set CTA_DATA to the folder above easy_vqa/)")
    prefix = f"easy_vqa/data/{split}/"
    images: dict[int, Images] = {}
    questions: list[tuple[str, str, int]] = []
    answers: list[str] = []
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            if file is None:
                continue
            if member.name == "easy_vqa/data/answers.txt":
                answers = file.read().decode().split()
            elif member.name == prefix + "questions.json":
                questions = json.load(file)
            elif member.name.startswith(prefix + "images/"):
                images[int(Path(member.name).stem)] = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
    row_of_image = {image_id: row for row, image_id in enumerate(sorted(images))}
    return EasyVqaSplit(
        images=np.stack([images[image_id] for image_id in sorted(images)]),
        questions=[question for question, _, _ in questions],
        image_indices=np.array([row_of_image[image_id] for _, _, image_id in questions]),
        answer_indices=np.array([answers.index(answer) for _, answer, _ in questions]),
        answers=answers,
    )


def background_colour(image: Images) -> npt.NDArray[np.uint8]:
    """The most frequent colour of the border of one ``(H, W, 3)`` image, as ``(3,)``."""
    border = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    colours, counts = np.unique(border, axis=0, return_counts=True)
    return np.asarray(colours[counts.argmax()])


def shape_mask(image: Images) -> Mask:
    """The pixels of the shape in one easy-VQA image: all that differ from the plain background.

    Exact, because the background is a single colour. Edge pixels in which shape and background are blended
    (the pictures were drawn larger and reduced) belong to the shape.

    Args:
        image: ``(64, 64, 3)``.

    Returns:
        ``(64, 64)`` booleans.
    """
    return np.asarray((image != background_colour(image)).any(axis=-1))


def shape_patches(image: Images) -> Mask:
    """Which patches of the 8x8 grid hold at least one pixel of the shape, as ``(8, 8)`` booleans."""
    blocks = shape_mask(image).reshape(GRID_SIZE, PATCH_SIZE, GRID_SIZE, PATCH_SIZE)
    return np.asarray(blocks.any(axis=(1, 3)))


def patch_features(images: Images) -> Features:
    """Cuts images into an 8x8 grid; a patch's feature is its raw pixels and its position.

    VisualBERT has no input for the place of a region, so the features carry it: one-hot row, one-hot column.

    Args:
        images: ``(N, 64, 64, 3)``, values 0 to 255.

    Returns:
        ``(N, 64, 208)``: 192 pixel values in [-1, 1] (row, column, channel), 8 rows, 8 columns; patches row by row.
    """
    blocks = images.reshape(-1, GRID_SIZE, PATCH_SIZE, GRID_SIZE, PATCH_SIZE, 3).transpose(0, 1, 3, 2, 4, 5)
    pixels = blocks.reshape(len(images), GRID_SIZE**2, -1).astype(np.float32) / 127.5 - 1
    one_hot = np.eye(GRID_SIZE, dtype=np.float32)
    positions = np.concatenate([one_hot.repeat(GRID_SIZE, axis=0), np.tile(one_hot, (GRID_SIZE, 1))], axis=1)
    return np.concatenate([pixels, np.broadcast_to(positions, (len(images), *positions.shape))], axis=2)


def patch_boxes() -> Features:
    """The boxes of the 64 patches as ``(64, 4)``: x0, y0, x1, y1 as fractions of the image (LXMERT's `visual_pos`)."""
    rows, columns = np.divmod(np.arange(GRID_SIZE**2), GRID_SIZE)
    return (np.stack([columns, rows, columns + 1, rows + 1], axis=1) / GRID_SIZE).astype(np.float32)


def move_shapes(images: Images, rng: np.random.Generator) -> Images:
    """Augmentation: flips each image left to right at random and moves its shape to a random place.

    Rolling the image is exact, as the background is plain and the shift never takes the shape over an edge.
    The answers do not depend on the place, and the three kinds of shape keep their kind when mirrored.

    Args:
        images: ``(N, 64, 64, 3)``; not changed.
        rng: source of the flips and shifts.
    """
    moved = np.empty_like(images)
    for index, image in enumerate(images):
        if rng.random() < 0.5:
            image = image[:, ::-1]
        mask = shape_mask(image)
        shift = []
        for occupied in (mask.any(axis=1), mask.any(axis=0)):
            places = np.flatnonzero(occupied)
            shift.append(int(rng.integers(-places[0], IMAGE_SIZE - places[-1])))
        moved[index] = np.roll(image, shift, axis=(0, 1))
    return moved
