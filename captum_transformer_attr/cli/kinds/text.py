"""Sentences and their classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from captum_transformer_attr.cli.cases import Case, TextView
from captum_transformer_attr.cli.kinds.classes import chosen_classes, class_logits, labelled
from captum_transformer_attr.comparison import element_scores
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.loading import TextModel, merge_pieces, words_of
from captum_transformer_attr.loading.words import Merge
from captum_transformer_attr.recording.outputs import unwrap
from captum_transformer_attr.visualization.report import FloatArray

LONGEST_TITLE = 70


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
    text, title = _text(given)
    encoded, pieces, words = encode(loaded.tokenizer, text, device)
    with torch.no_grad():
        output = unwrap(loaded.model(**encoded))
    logits = class_logits(output, loaded.name)
    indices = chosen_classes(loaded, logits, targets, top)
    labels = labelled(loaded, indices)
    probabilities = loaded.probabilities(logits[None])[0]
    cut = len(words) < len(text.split())
    return Case(
        title=title,
        inputs=encoded,
        targets=tuple(zip(labels, indices, strict=True)),
        views=(TextView("text", words, partial(_word_scores, pieces=pieces, merge=merge)),),
        probabilities={label: float(probabilities[index]) for label, index in zip(labels, indices, strict=True)},
        note=f"predicted: {labelled(loaded, [int(logits.argmax())])[0]}"
        + (f"; cut off after {len(words)} words, the longest the model reads" if cut else ""),
    )


def encode(tokenizer: Any, text: str, device: torch.device) -> tuple[dict[str, Any], list[list[int]], tuple[str, ...]]:
    """Model input for a text, and which pieces make up its words.

    Returns:
        The tokenizer's tensors, the piece indices of every word, and the words. A tokenizer that cannot tell where its
        pieces come from gives one word per piece.

    Raises:
        InputError: if nothing is left of the text.
    """
    fast = getattr(tokenizer, "is_fast", False)
    # Some tokenizers know no longest length and then say a number of the order of 1e30.
    limit = tokenizer.model_max_length if tokenizer.model_max_length < 1_000_000 else None
    batch = tokenizer(
        text, return_tensors="pt", truncation=limit is not None, max_length=limit, return_offsets_mapping=fast
    )
    offsets = batch.pop("offset_mapping")[0].tolist() if fast else []
    encoded = {key: value.to(device) for key, value in batch.items()}
    if fast:
        words, pieces = words_of(text, [tuple(pair) for pair in offsets])
    else:
        names = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
        pieces = [[index] for index, name in enumerate(names) if name not in tokenizer.all_special_tokens]
        words = tuple(names[own[0]] for own in pieces)
    if not words:
        raise InputError("the text holds no words")
    return encoded, pieces, words


def _text(given: str) -> tuple[str, str]:
    """The text and a heading for it."""
    try:
        is_file = Path(given).is_file()
    except (OSError, ValueError):  # a sentence can be too long for a file name
        is_file = False
    if is_file:
        try:
            return Path(given).read_text(encoding="utf-8"), Path(given).name
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"text file {given} cannot be read: {error}") from error
    return given, given if len(given) <= LONGEST_TITLE else given[: LONGEST_TITLE - 1] + "…"


def _word_scores(attributions: Any, pieces: list[list[int]], merge: Merge) -> FloatArray:
    scores = element_scores(attributions["input_ids"])[0].cpu().numpy()
    return merge_pieces(scores, pieces, merge)
