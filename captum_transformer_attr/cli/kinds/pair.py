"""An image and texts, in a contrastive model such as CLIP: why do they fit?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from captum_transformer_attr.cli.cases import Case, ImageView, Question, TextView
from captum_transformer_attr.cli.kinds.classes import model_scores
from captum_transformer_attr.cli.kinds.image import image_scores
from captum_transformer_attr.cli.kinds.text import encode, shortened
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.loading import PairModel, read_image
from captum_transformer_attr.loading.words import Merge


def pair_case(loaded: PairModel, path: str, texts: Sequence[str], device: torch.device, merge: Merge) -> Case:
    """Read a picture and texts; every text is a question.

    Args:
        loaded: A contrastive model.
        path: Of the picture.
        texts: What the user wrote after ``--text``.
        device: Where the model is.
        merge: How the scores of word pieces become a word's.

    Raises:
        InputError: if there is no text, or the picture cannot be read.
    """
    if not texts:
        raise InputError(f"model {loaded.name} compares an image with texts: give at least one --text")
    pixels = loaded.preprocessing(read_image(path))
    # A model with a sigmoid loss was trained on texts of full length.
    padding = "max_length" if loaded.multi_label else False
    encoded = {text: encode(loaded.tokenizer, text, device, merge, padding) for text in dict.fromkeys(texts)}
    inputs = {text: {"pixel_values": pixels[None].to(device), **entry.inputs} for text, entry in encoded.items()}
    fits = torch.cat([model_scores(loaded, given)[:, 0] for given in inputs.values()])
    known = len(inputs) > 1 or loaded.multi_label
    probabilities = loaded.probabilities(fits[None])[0].tolist() if known else [None]
    questions = tuple(
        Question(text, 0, given, probability)
        for (text, given), probability in zip(inputs.items(), probabilities, strict=True)
    )
    views = (
        ImageView("image", loaded.preprocessing.picture(pixels), image_scores),
        TextView(
            "text",
            {text: entry.words for text, entry in encoded.items()},
            lambda attributions, label: encoded[label].scores(attributions),
        ),
    )
    notes = [f"{shortened(text)}{entry.note()}" for text, entry in encoded.items() if entry.cut]
    return Case(Path(path).name, questions, views, ". ".join(notes))
