"""Sentences and their classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from captum_transformer_attr.cli.cases import Case, TextView
from captum_transformer_attr.cli.kinds.classes import class_questions
from captum_transformer_attr.comparison import element_scores
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.loading import TextModel, merge_pieces, words_of
from captum_transformer_attr.loading.words import Merge
from captum_transformer_attr.visualization.report import FloatArray

LONGEST_TITLE = 70
NO_LIMIT = 1_000_000
"""Tokenizers that know no longest length say a number of the order of 1e30."""


@dataclass(frozen=True)
class EncodedText:
    """A text as the model reads it and as people do.

    Attributes:
        inputs: The tokenizer's tensors, a batch of one.
        words: The words that made it into the inputs.
        pieces: Per word the positions of its pieces.
        merge: How scores of pieces become a word's.
        cut: Whether the text was longer than the model reads.
    """

    inputs: dict[str, torch.Tensor]
    words: tuple[str, ...]
    pieces: list[list[int]]
    merge: Merge
    cut: bool

    def scores(self, attributions: Any, label: str = "") -> FloatArray:
        """One score per word from attributions of ``input_ids``."""
        values = element_scores(attributions["input_ids"])[0].cpu().numpy()
        return merge_pieces(values, self.pieces, self.merge)

    def note(self) -> str:
        """What the user should know, behind other remarks."""
        return f"; cut off after {len(self.words)} words, the longest the model reads" if self.cut else ""


def text_case(
    loaded: TextModel, given: str, targets: Sequence[str], top: int, device: torch.device, merge: Merge
) -> Case:
    """Tokenise a sentence, predict, and say which classes to explain.

    Args:
        loaded: The classifier.
        given: The sentence, or the path of a text file.
        targets: Classes the user wants; the ``top`` predictions if empty.
        top: How many predictions.
        device: Where the model is.
        merge: How the scores of word pieces become a word's.

    Raises:
        InputError: if the text is empty or a class does not exist.
    """
    text, title = read_text(given)
    encoded = encode(loaded.tokenizer, text, device, merge)
    questions, predicted = class_questions(loaded, encoded.inputs, targets, top)
    view = TextView("text", encoded.words, encoded.scores)
    return Case(title, questions, (view,), f"predicted: {predicted}{encoded.note()}")


def encode(tokenizer: Any, text: str, device: torch.device, merge: Merge, padding: bool | str = False) -> EncodedText:
    """Model input for a text, and which pieces make up its words.

    A tokenizer that cannot tell where its pieces come from gives one word per piece.

    Args:
        tokenizer: Of transformers.
        text: What to read.
        device: Where the model is.
        merge: How scores of pieces become a word's.
        padding: As for the tokenizer.

    Raises:
        InputError: if nothing is left of the text.
    """
    fast = getattr(tokenizer, "is_fast", False)
    limit = tokenizer.model_max_length if tokenizer.model_max_length < NO_LIMIT else None
    batch = tokenizer(
        text,
        return_tensors="pt",
        truncation=limit is not None,
        max_length=limit,
        padding=padding,
        return_offsets_mapping=fast,
    )
    offsets = batch.pop("offset_mapping")[0].tolist() if fast else []
    inputs = {key: value.to(device) for key, value in batch.items()}
    if fast:
        words, pieces = words_of(text, [tuple(pair) for pair in offsets])
    else:
        names = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
        pieces = [[index] for index, name in enumerate(names) if name not in tokenizer.all_special_tokens]
        words = tuple(names[own[0]] for own in pieces)
    if not words:
        raise InputError("the text holds no words")
    return EncodedText(inputs, words, pieces, merge, cut=fast and len(words) < len(text.split()))


def read_text(given: str) -> tuple[str, str]:
    """The text and a heading for it.

    Raises:
        InputError: if ``given`` names a file that is no readable text.
    """
    path = Path(given)
    try:
        is_file, is_folder = path.is_file(), bool(given) and path.is_dir()
    except (OSError, ValueError):  # a sentence can be too long for a file name
        return given, shortened(given)
    if is_folder and len(path.parts) > 1:
        raise InputError(f"{given} is a folder; give a sentence or a text file")
    if not is_file:
        if path.suffix == ".txt" and not any(letter.isspace() for letter in given):
            raise InputError(f"text file {given} does not exist")
        return given, shortened(given)
    try:
        return path.read_text(encoding="utf-8"), path.name
    except UnicodeDecodeError as error:
        raise InputError(f"{given} is not UTF-8 text; give a sentence or a text file") from error
    except OSError as error:
        raise InputError(f"text file {given} cannot be read: {error.strerror}") from error


def shortened(text: str) -> str:
    """The text, or its beginning, as a heading."""
    return text if len(text) <= LONGEST_TITLE else text[: LONGEST_TITLE - 1] + "…"
