"""Starts the command line. It lies beside the package, because importing anything of the package imports torch."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def main() -> int:
    """Run the command of the process's arguments; Ctrl-C is quiet while torch is being imported, too."""
    # A shell's background jobs ignore Ctrl-C, and go on doing so.
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeded:
        signal.signal(signal.SIGINT, _leave)
    from captum_transformer_attr.cli import main as run

    if heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return run()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


def _leave(*signal_and_frame: Any) -> None:
    """End at once: some imports swallow a KeyboardInterrupt and go on."""
    os.write(2, b"error: interrupted\n")
    os._exit(130)
