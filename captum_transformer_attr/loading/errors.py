"""The error of everything that is read from outside."""

from __future__ import annotations

from captum_transformer_attr.errors import InputError


class LoadingError(InputError):
    """A file, model name, label or option that cannot be used. The message is one line and says what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, for quoting inside a one-line message."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip()
    return type(error).__name__
