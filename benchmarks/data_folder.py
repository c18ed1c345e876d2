"""Where the data sets and checkpoints lie that benchmarks and tests read."""

from __future__ import annotations

import os
from pathlib import Path


def data_folder() -> Path:
    """The environment variable ``CTA_DATA``, or ``../shared/data`` beside the project; read at every call."""
    return Path(os.environ.get("CTA_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
