"""Answers to a question about an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from captum_transformer_attr.cli.cases import Case, ImageView, TextView
from captum_transformer_attr.cli.kinds.classes import class_questions
from captum_transformer_attr.cli.kinds.image import image_scores
from captum_transformer_attr.cli.kinds.text import encode, shortened
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.loading import AnswerModel, read_image
from captum_transformer_attr.loading.words import Merge


def answer_cases(
    loaded: AnswerModel,
    path: str,
    texts: Sequence[str],
    targets: Sequence[str],
    top: int,
    device: torch.device,
    merge: Merge,
) -> list[Case]:
    """Read a picture; every question about it is a case, every answer to explain a question of ours.

    Args:
        loaded: A model that classifies answers.
        path: Of the picture.
        texts: What the user asks about it, after ``--text``.
        targets: Answers the user wants explained; the ``top`` predictions if empty.
        top: How many predictions.
        device: Where the model is.
        merge: How the scores of word pieces become a word's.

    Raises:
        InputError: if there is no question, the picture cannot be read, or an answer does not exist.
    """
    if not texts:
        raise InputError(f"model {loaded.name} answers questions about an image: ask one with --text")
    pixels = loaded.preprocessing(read_image(path))
    cases = []
    for text in texts:
        encoded = encode(loaded.tokenizer, text, device, merge)
        inputs = {"pixel_values": pixels[None].to(device), **encoded.inputs}
        questions, predicted = class_questions(loaded, inputs, targets, top)
        views = (
            ImageView("image", loaded.preprocessing.picture(pixels), image_scores),
            TextView("question", encoded.words, encoded.scores),
        )
        title = f"{Path(path).name}: {shortened(text)}"
        cases.append(Case(title, questions, views, f"answer: {predicted}{encoded.note()}"))
    return cases
