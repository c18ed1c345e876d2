"""Output files appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from captum_transformer_attr.output_files import check_writable, write_files, write_texts


def test_files_appear_all_or_none(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("full disk")

    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    with pytest.raises(RuntimeError, match="full disk"):
        write_files({first: lambda path: None, second: fail})
    assert list(tmp_path.iterdir()) == []
    first.write_text("old")
    with pytest.raises(RuntimeError):
        write_files({first: lambda path: None, second: fail})
    assert first.read_text() == "old"
    write_texts({first: "neü", second: "other"})
    assert first.read_text(encoding="utf-8") == "neü"
    assert second.read_text(encoding="utf-8") == "other"
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    former = os.umask(0o027)
    try:
        write_texts({tmp_path / "a.txt": "text"})
    finally:
        os.umask(former)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_unwritable_outputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(OSError, match="does not exist"):
        check_writable(tmp_path / "missing" / "a.html")
    with pytest.raises(OSError, match="does not exist"):
        write_texts({tmp_path / "missing" / "a.html": "page"})
