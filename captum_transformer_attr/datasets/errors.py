"""The error of everything that is read from a data set."""

from __future__ import annotations

from captum_transformer_attr.errors import InputError


class DatasetError(InputError):
    """A file or folder of a data set is missing, damaged or of another format; the message names it in one line."""
