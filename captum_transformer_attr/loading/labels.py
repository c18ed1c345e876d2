"""Names of classes, and from what a user types to a class index."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

from captum_transformer_attr.loading.errors import LoadingError, first_line


def read_labels(path: str | Path) -> tuple[str, ...]:
    """Class names from a file: a JSON list, a JSON object ``{"0": name, ...}``, or plain text with one name per line.

    Raises:
        LoadingError: if the file cannot be read or leaves an index without a name.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadingError(f"labels file {path} cannot be read: {first_line(error)}") from error
    if Path(path).suffix != ".json":
        names = tuple(line.strip() for line in text.splitlines() if line.strip())
        if not names:
            raise LoadingError(f"labels file {path} is empty")
        return names
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            content = [content[str(index)] for index in range(len(content))]
        if not isinstance(content, list) or not content:
            raise ValueError("it holds no names")
        return tuple(str(name) for name in content)
    except (ValueError, KeyError) as error:
        reason = f"no name for {error}" if isinstance(error, KeyError) else error
        raise LoadingError(f'labels file {path} must be a JSON list or {{"0": name, "1": ...}}: {reason}') from error


def short_name(name: str) -> str:
    """The first of several synonyms: ImageNet's ``"tabby, tabby cat"`` gives ``"tabby"``."""
    return name.split(",")[0].strip() or name


def class_index(wanted: str, names: Sequence[str] | None, count: int) -> int:
    """The class a user means.

    Args:
        wanted: An index, a class name, one of its comma-separated synonyms, or a part that only one name contains;
            case does not matter. A name that is itself a number means that class.
        names: Class names, or None where the model has none.
        count: Number of classes.

    Raises:
        LoadingError: if no class or more than one class is meant.
    """
    text = wanted.strip().lower()
    lowered = [name.lower() for name in names] if names else []
    for matches in (
        [index for index, name in enumerate(lowered) if name == text],
        [index for index, name in enumerate(lowered) if text in (synonym.strip() for synonym in name.split(","))],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise LoadingError(f"target {wanted!r} names {len(matches)} classes: give one of the indices {matches}")
    if text.lstrip("-").isdigit():
        index = int(text)
        if not 0 <= index < count:
            raise LoadingError(f"target {index} is out of range: the model has {count} classes, 0 to {count - 1}")
        return index
    if not names:
        raise LoadingError(f"target {wanted!r}: this model has no class names; give an index or a labels file")
    containing = [index for index, name in enumerate(lowered) if text and text in name]
    if len(containing) == 1:
        return containing[0]
    if containing:
        shown = ", ".join(f"{names[index]!r} ({index})" for index in containing[:5])
        raise LoadingError(f"target {wanted!r} fits several classes: {shown}")
    synonyms = {synonym.strip(): name for name in lowered for synonym in name.split(",")}
    similar = difflib.get_close_matches(text, synonyms, n=3)
    hint = f"; did you mean {', '.join(repr(name) for name in similar)}?" if similar else ""
    raise LoadingError(f"target {wanted!r} is no class of this model{hint}")
