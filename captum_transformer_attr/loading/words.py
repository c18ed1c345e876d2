"""Word pieces and words."""

from __future__ import annotations

import re
from typing import Literal

import numpy as np

from captum_transformer_attr.visualization.report import FloatArray

Merge = Literal["max", "sum", "mean"]


def words_of(text: str, offsets: list[tuple[int, int]]) -> tuple[tuple[str, ...], list[list[int]]]:
    """Which word pieces make up each word of a text.

    Words are what white space separates, as in rationale data sets. Pieces with an empty offset (special tokens)
    belong to no word; a word without pieces (cut off by truncation) is left out.

    Args:
        text: The text that was tokenised.
        offsets: Per piece its ``(start, end)`` characters.

    Returns:
        The words, and for each the indices of its pieces.
    """
    words, pieces = [], []
    for match in re.finditer(r"\S+", text):
        # Byte-level tokenizers count the space before a word to its first piece, so overlap decides, not containment.
        own = [
            index
            for index, (start, end) in enumerate(offsets)
            if start < end and max(start, match.start()) < min(end, match.end())
        ]
        if own:
            words.append(match.group())
            pieces.append(own)
    return tuple(words), pieces


def merge_pieces(scores: FloatArray, pieces: list[list[int]], how: Merge = "max") -> FloatArray:
    """Scores of words from scores of their pieces.

    Args:
        scores: ``(T,)``, one score per piece.
        pieces: Per word the indices of its pieces.
        how: ``"max"``: the score of largest magnitude (for positive scores the maximum, as in the ERASER protocol of
            Chefer et al. 2021); ``"sum"``: keeps the total of conserving methods; ``"mean"``.

    Returns:
        ``(W,)``, one score per word.
    """
    if how == "sum":
        return np.array([scores[own].sum() for own in pieces])
    if how == "mean":
        return np.array([scores[own].mean() for own in pieces])
    return np.array([scores[own][np.abs(scores[own]).argmax()] for own in pieces])
