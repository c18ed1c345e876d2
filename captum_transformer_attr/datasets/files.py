"""Files of a folder, a zip or a tar archive by the same names, and decoding them with errors that name them."""

from __future__ import annotations

import io
import json
import lzma
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from captum_transformer_attr.datasets.errors import DatasetError

# What Python's readers of archives raise for damaged, encrypted (RuntimeError) or unknown content.
_DAMAGE = (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


class FileStore:
    """Read access to the files below a folder or inside a .zip, .tar, .tar.gz archive.

    A tar archive is read into memory at once, since its members cannot be reached singly.

    Raises:
        DatasetError: the path does not exist or the archive is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._content: dict[str, bytes] | None = None
        self._archive: zipfile.ZipFile | None = None
        if self.path.is_dir():
            return
        if not self.path.exists():
            raise DatasetError(f"{self.path} does not exist")
        try:
            if zipfile.is_zipfile(self.path):
                self._archive = zipfile.ZipFile(self.path)
            else:
                with tarfile.open(self.path) as archive:
                    members = [member for member in archive.getmembers() if member.isfile()]
                    self._content = {m.name: archive.extractfile(m).read() for m in members}  # type: ignore[union-attr]
        except _DAMAGE as error:
            raise DatasetError(f"{self.path} is not a readable zip or tar archive, and no folder") from error

    def names(self) -> list[str]:
        """All files, sorted, with forward slashes."""
        if self._content is not None:
            return sorted(self._content)
        if self._archive is not None:
            return sorted(name for name in self._archive.namelist() if not name.endswith("/"))
        return sorted(p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file())

    def find(self, ending: str) -> str:
        """The one file whose path ends so.

        Raises:
            DatasetError: there is none, or several.
        """
        found = [name for name in self.names() if name == ending or name.endswith("/" + ending)]
        if len(found) != 1:
            raise DatasetError(f"{self.path} holds {len(found) or 'no'} files named {ending}, one was expected")
        return found[0]

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            DatasetError: it is missing or cannot be read.
        """
        try:
            if self._content is not None:
                return self._content[name]
            if self._archive is not None:
                return self._archive.read(name)
            return (self.path / name).read_bytes()
        except (KeyError, FileNotFoundError):
            raise DatasetError(f"{self.path / name} does not exist") from None
        except (*_DAMAGE, ValueError) as error:  # ValueError: a name that no file can have
            raise DatasetError(f"{self.path / name} cannot be read: {error}") from error

    def text(self, name: str) -> str:
        """The content of a text file in UTF-8."""
        return decode_text(self.read(name), self.path / name)

    def image(self, name: str) -> np.ndarray:
        """The content of a picture, (H, W, 3) uint8."""
        return decode_image(self.read(name), self.path / name)


def read_file(path: str | Path) -> bytes:
    """The content of a single file; an error names it."""
    check_file(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error


def check_file(path: str | Path) -> None:
    """Refuses what is missing, and a folder where a file is meant."""
    if not Path(path).is_file():
        raise DatasetError(f"{path} {'is no file' if Path(path).exists() else 'does not exist'}")


def decode_text(content: bytes, path: str | Path) -> str:
    """UTF-8 text; an error names the file."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def decode_image(content: bytes, path: str | Path) -> np.ndarray:
    """A picture as RGB, (H, W, 3) uint8, not turned by EXIF: masks and boxes are meant for the pixels as stored."""
    try:
        with Image.open(io.BytesIO(content)) as opened:
            return np.asarray(opened.convert("RGB"))
    except UnidentifiedImageError:
        raise DatasetError(f"{path} is not an image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path} is a damaged image: {error}") from error


def parse_json(text: str, path: str | Path) -> Any:
    """JSON; an error names file and line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path} is not valid JSON: {error.msg} in line {error.lineno}") from error
    except RecursionError as error:
        raise DatasetError(f"{path} is not readable JSON: nested too deeply") from error


def parse_json_lines(text: str, path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """One JSON object per line with its line number; empty lines are left out."""
    rows = []
    # Not splitlines(): JSON strings may hold the other separators that Unicode knows.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DatasetError(f"line {number} of {path} is not valid JSON: {error.msg}") from error
        except RecursionError as error:
            raise DatasetError(f"line {number} of {path} is not readable JSON: nested too deeply") from error
        if not isinstance(row, dict):
            raise DatasetError(f"line {number} of {path} is a {type(row).__name__}, a JSON object was expected")
        rows.append((number, row))
    if not rows:
        raise DatasetError(f"{path} is empty")
    return rows
