"""The command line: ``captum-transformer-attr demo | explain | coverage | evaluate``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        arguments: What stands behind the program's name; by default the process's own arguments.
    """
    try:
        from captum_transformer_attr.cli.app import run
    except ModuleNotFoundError as error:
        print(
            f"error: the command line needs {error.name}: pip install 'captum-transformer-attr[cli]'", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:  # while torch is being imported
        print("error: interrupted", file=sys.stderr)
        return 130
    return run(arguments)
