"""Results on standard output."""

from __future__ import annotations

import os
import sys


def print_json(text: str) -> None:
    """Write what ``--json`` asks for.

    Raises:
        OSError: saying where the text did not fit.
    """
    try:
        print(text.rstrip("\n"), flush=True)
    except BrokenPipeError:  # of a reader that has seen enough, typer makes a quiet end
        raise
    except OSError as error:
        _forget_rest()
        raise OSError(f"--json cannot be written to standard output: {error.strerror}") from error


def _forget_rest() -> None:
    """Python would try to write the rest again when it ends, and fail with a message of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
