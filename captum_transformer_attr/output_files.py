"""Output files appear whole or not at all; several that belong together, all or none."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from captum_transformer_attr.errors import InputError

Writer = Callable[[Path], object]


def check_writable(path: str | Path) -> None:
    """Find out before the work whether a file can be written, and leave no trace.

    Raises:
        OSError: naming the path, if it is a folder or a device, or if its folder is missing or not writable.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {target}: it is a folder")
    if target.exists() and not target.is_file():  # the new file would take the place of a device such as /dev/null
        raise PermissionError(f"cannot write {target}: it is no regular file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: the folder {target.parent} does not exist")
    try:
        _temporary_beside(target).unlink()
    except OSError as error:
        raise PermissionError(f"cannot write {target}: {error.strerror}") from error


def check_apart(outputs: Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """Refuse outputs that would overwrite what is read, or each other.

    Raises:
        InputError: naming the path.
    """
    read = {Path(path).resolve() for path in inputs if _exists(path)}
    written: set[Path] = set()
    for path in outputs:
        if path.resolve() in read:
            raise InputError(f"cannot write {path}: it is one of the inputs; choose another name")
        if path.resolve() in written:
            raise InputError(f"cannot write {path}: two outputs have this name")
        written.add(path.resolve())


def write_files(writers: Mapping[Path, Writer]) -> None:
    """Write several files so that either all of them appear or none.

    Each writer gets a temporary path in the folder of its file; the files take their names once all are written.

    Args:
        writers: Path -> function that writes that file at the path it is given.

    Raises:
        OSError: as :func:`check_writable`; nothing is left behind then.
    """
    for path in writers:
        check_writable(path)
    written: dict[Path, Path] = {}
    try:
        for path, write in writers.items():
            written[path] = _temporary_beside(path)
            write(written[path])
        for path, temporary in written.items():
            os.replace(temporary, path)
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write several texts as :func:`write_files` does, in UTF-8."""

    def writer(text: str) -> Writer:
        return lambda path: path.write_text(text, encoding="utf-8")

    write_files({path: writer(text) for path, text in texts.items()})


def _temporary_beside(path: Path) -> Path:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    # mkstemp makes files that only their owner may read; the result should be like any file the user makes.
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o666 & ~mask)
    return temporary


def _exists(path: str | Path) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a sentence can be too long for a file name
        return False
