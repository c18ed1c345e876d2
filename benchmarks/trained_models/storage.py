"""Where trained checkpoints live, how they are written, and the error when one is missing.

A finished checkpoint of at most 2 MB is committed in ``checkpoints/`` beside this file. Larger or newly trained ones
are in the cache folder: environment variable ``CTA_CACHE``, default ``~/.cache/captum_transformer_attr``. The cache
comes first, so that a model trained again replaces the committed one.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

COMMITTED_DIR = Path(__file__).resolve().parent / "checkpoints"
REPORT_FILE = "training.json"


class MissingCheckpointError(FileNotFoundError):
    """A trained model was asked for that nobody has trained yet."""


def cache_dir() -> Path:
    """The folder for trained checkpoints: ``CTA_CACHE`` or ``~/.cache/captum_transformer_attr``; may not exist yet."""
    return Path(os.environ.get("CTA_CACHE") or Path.home() / ".cache" / "captum_transformer_attr").expanduser()


def find_checkpoint(name: str, command: str) -> Path:
    """The folder of a trained checkpoint: in the cache, else the committed one.

    Args:
        name: the checkpoint's folder name.
        command: what trains the model, for the error message.

    Raises:
        MissingCheckpointError: neither place has it.
    """
    places = [cache_dir() / name, COMMITTED_DIR / name]
    for place in places:
        if (place / "config.json").is_file() and (place / "model.safetensors").is_file():
            return place
    raise MissingCheckpointError(f"no trained {name} in {places[0]} or {places[1]}; train it with: {command}")


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    report: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Writes weights (safetensors, float16), configuration, tokenizer and a training report, all or nothing.

    The folder is written under a temporary name beside its destination and moved into place at the end; an
    interrupted write leaves the previous checkpoint as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        state = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
        model.save_pretrained(temporary, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        (temporary / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
        temporary.chmod(0o755)  # mkdtemp makes folders only their owner can read
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as retired:
            if folder.exists():
                folder.replace(Path(retired) / folder.name)
            temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_model(model_class: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """Loads a checkpoint folder in float32 and eval mode, without looking at the network."""
    bar_was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would flash by: these files are read in milliseconds
    try:
        return model_class.from_pretrained(folder, local_files_only=True).float().eval()
    finally:
        if bar_was_on:
            logging.enable_progress_bar()
