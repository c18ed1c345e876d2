"""Text in pictures: fonts that have its letters, widths as they are drawn, and lines that fit."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import matplotlib
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

RESOLUTIONS = (72, 100, 130)
"""Dots per inch of measuring: letters are a whole number of dots wide, so that their width in inches differs."""
SPACE = 0.35
"""Width of the space between two words, as a share of the font size."""
LONGEST_LINE = 1000
"""Letters that are tried in one line; more than fit in any."""


@dataclass(frozen=True)
class Piece:
    """What stands of a token in one line: all of it, or as much as fits.

    Attributes:
        index: Of the token.
        text: What is written.
        left: Distance from the left edge, in inches.
        width: In inches, padding included.
    """

    index: int
    text: str
    left: float
    width: float


def wrap(
    tokens: Sequence[str], width: float, size: float, *, weight: str = "normal", padding: float = 0.0, gap: float = 0.0
) -> list[list[Piece]]:
    """Break tokens into lines; a token longer than a line is broken as well.

    Args:
        tokens: What is written side by side.
        width: Of a line, in inches.
        size: Of the font, in points.
        weight: Of the font.
        padding: Added to the width of every piece.
        gap: Between two pieces.
    """
    measure = _ruler(size, weight)

    def parts(token: str) -> Iterator[str]:
        while len(token) > LONGEST_LINE or measure(token) > width - padding:
            ends = range(1, min(len(token), LONGEST_LINE))
            end = max(1, bisect_right(ends, width - padding, key=lambda end: measure(token[:end])))
            yield token[:end]
            token = token[end:]
            if not token:
                return
        yield token

    lines: list[list[Piece]] = [[]]
    left = 0.0
    with no_glyph_warnings():
        for index, token in enumerate(tokens):
            for text in parts(token):
                needed = measure(text) + padding
                if left + needed > width and lines[-1]:
                    lines.append([])
                    left = 0.0
                lines[-1].append(Piece(index, text, left, needed))
                left += needed + gap
    return lines


def text_width(text: str, size: float) -> float:
    """Width of a text in inches."""
    with no_glyph_warnings():
        return _ruler(size, "normal")(text)


def fill(text: str, width: float, size: float, weight: str = "normal") -> str:
    """A text with line breaks where it would be wider than ``width`` inches."""
    lines = wrap(text.split(" "), width, size, weight=weight, gap=SPACE * size / 72)
    return "\n".join(" ".join(piece.text for piece in line) for line in lines)


@contextmanager
def fonts_for(texts: Iterable[str]) -> Iterator[None]:
    """Inside, whatever is drawn falls back to installed fonts that have the letters of ``texts``."""
    with matplotlib.rc_context({"font.family": [*_own_families(), *_fallbacks(_lacking(texts))[0]]}):
        yield


def letters_without_font(texts: Iterable[str]) -> str:
    """The letters that no installed font has; they are drawn as boxes."""
    return "".join(sorted(_fallbacks(_lacking(texts))[1]))


@contextmanager
def no_glyph_warnings() -> Iterator[None]:
    """Silence matplotlib's warning per missing letter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _ruler(size: float, weight: str) -> Callable[[str], float]:
    renderers, font = [RendererAgg(1, 1, dots) for dots in RESOLUTIONS], FontProperties(size=size, weight=weight)
    return lambda text: max(one.get_text_width_height_descent(text, font, False)[0] / one.dpi for one in renderers)


def _own_families() -> list[str]:
    families = matplotlib.rcParams["font.family"]
    return [families] if isinstance(families, str) else list(families)


def _lacking(texts: Iterable[str]) -> frozenset[str]:
    """The letters that the configured fonts do not have."""
    letters = frozenset(letter for text in texts for letter in text if not letter.isspace())
    for family in _own_families():
        if letters:
            letters -= _letters_in(findfont(FontProperties(family=[family])), letters)
    return letters


@lru_cache(maxsize=64)
def _fallbacks(letters: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """Families that have some of the letters, fonts without serifs first, and the letters that none has."""
    chosen = []
    plainest_last = sorted(fontManager.ttflist, key=lambda entry: (entry.style == "normal", entry.weight == 400))
    files = {entry.name: entry.fname for entry in plainest_last}
    for family in sorted(files, key=lambda name: ("Sans" not in name, name)):
        if not letters:
            break
        # matplotlib's font of last resort has a box for every letter.
        if "lastresort" not in family.replace(" ", "").lower() and (found := _letters_in(files[family], letters)):
            chosen.append(family)
            letters -= found
    return chosen, letters


def _letters_in(file: str, letters: frozenset[str]) -> frozenset[str]:
    try:
        font = get_font(file)
    except (OSError, RuntimeError):  # removed since, or not readable for matplotlib
        return frozenset()
    if not font.scalable:  # coloured emoji are pictures, which matplotlib does not draw
        return frozenset()
    known = font.get_charmap()
    return frozenset(letter for letter in letters if ord(letter) in known)
