"""Finished work on disk, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.metrics import Accumulator
from captum_transformer_attr.output_files import check_writable, write_files


@dataclass
class Progress:
    """How far one method has come on one task.

    Attributes:
        done: examples finished.
        seconds: spent on attributing them.
        finished: nothing is left to do.
        error: why the method cannot be applied; one line.
        skipped: reasons of the examples that could not be read.
        accumulators: the numbers so far, by measure.
    """

    accumulators: Mapping[str, Accumulator]
    done: int = 0
    seconds: float = 0.0
    finished: bool = False
    error: str = ""
    skipped: tuple[str, ...] = ()


class Store:
    """A folder with one file per task and method.

    A file whose description (model, data, metrics, options) is another one is not used and is overwritten, unless it
    holds the first examples of the run: then the run goes on behind them.

    Args:
        folder: made if missing; None keeps nothing.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def prepare(self, task: str) -> None:
        """Makes the folder of a task, before any work is done that could not be kept.

        Raises:
            InputError: naming the folder, if it cannot be made or written to.
        """
        if self.folder is None:
            return
        folder = self.folder / _file_name(task)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            check_writable(folder / "work.npz")
        except OSError as error:
            raise InputError(f"finished work cannot be kept in {self.folder}: {error.strerror or error}") from error

    def load(self, description: Mapping[str, Any], method: str, progress: Progress) -> None:
        """Fills `progress` with what was stored, if anything fits."""
        path = self._path(description, method)
        if path is None or not path.is_file():
            return
        try:
            with np.load(path, allow_pickle=False) as file:
                header = json.loads(str(file["header"]))
                arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "header"}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
            return  # a damaged file is work lost, not an error: it is done again
        if header["description"] == _plain(description):
            progress.finished, progress.error, usable = header["finished"], header["error"], header["done"]
            progress.skipped = tuple(header["skipped"])
        else:
            usable = 0 if header["error"] else shared_examples(header, _plain(description))
            arrays = {key: values[:usable] for key, values in arrays.items()}
        if usable == 0:
            return
        progress.done, progress.seconds = usable, header["seconds"] * usable / header["done"]
        for name, accumulator in progress.accumulators.items():
            columns = {key.split("/", 1)[1]: value for key, value in arrays.items() if key.split("/", 1)[0] == name}
            if columns:
                accumulator.load_state_dict(columns)

    def save(self, description: Mapping[str, Any], method: str, progress: Progress) -> None:
        """Writes the state; the file is complete or not there."""
        path = self._path(description, method)
        if path is None:
            return
        header = {
            "description": _plain(description),
            "done": progress.done,
            "seconds": progress.seconds,
            "finished": progress.finished,
            "error": progress.error,
            "skipped": progress.skipped,
        }
        arrays: dict[str, Any] = {
            f"{name}/{key}": value.numpy()
            for name, accumulator in progress.accumulators.items()
            for key, value in accumulator.examples().items()  # the header describes the options
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_files({path: lambda temporary: np.savez(temporary, header=np.array(json.dumps(header)), **arrays)})

    def _path(self, description: Mapping[str, Any], method: str) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / _file_name(str(description["task"])) / f"{_file_name(method)}.npz"


def shared_examples(header: Mapping[str, Any], description: Mapping[str, Any]) -> int:
    """How many stored examples a longer run with otherwise the same description begins with, in whole batches."""
    stored = dict(header["description"])
    wanted = dict(description)
    first, longer = stored.pop("indices", None), wanted.pop("indices", None)
    if stored != wanted or not first or list(longer)[: len(first)] != list(first):
        return 0
    size = wanted.get("batch_size") or 1
    return int(header["done"]) // size * size


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", text).strip("_")


def _plain(description: Mapping[str, Any]) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(description))
