"""What all readers share: examples by index, damaged ones named and counted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from captum_transformer_attr.datasets.errors import DatasetError

Example = TypeVar("Example", covariant=True)


@dataclass(frozen=True)
class Skipped:
    """An example that could not be read.

    Attributes:
        index: its place in the reader.
        reason: one line that names the file.
    """

    index: int
    reason: str


class Reader(ABC, Generic[Example]):
    """A data set in a folder or file: the index is read at once, examples one at a time.

    Args:
        paths: the files and folders it reads.

    Attributes:
        skipped: examples that iterating left out, in the order met; each is recorded once.
        source: the paths, absolute: which data these are, for work that is stored.
        has_regions: whether pictures come with their objects' places; without, no metric of places has a meaning.
    """

    has_regions: bool = True

    def __init__(self, *paths: str | Path) -> None:
        self.skipped: list[Skipped] = []
        self.source: tuple[str, ...] = tuple(str(Path(path).resolve()) for path in paths)

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples listed, readable or not."""

    @abstractmethod
    def load(self, index: int) -> Example:
        """Reads one example.

        Raises:
            DatasetError: its file is missing or damaged; named.
        """

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self.load(index)

    def __iter__(self) -> Iterator[Example]:
        return (example for _, example in self.examples())

    def examples(
        self, indices: Iterable[int] | None = None, *, on_error: Literal["skip", "raise"] = "skip"
    ) -> Iterator[tuple[int, Example]]:
        """Reads examples in turn, with their indices.

        Args:
            indices: which ones; all by default.
            on_error: `"skip"` leaves damaged examples out and records them in `skipped`, `"raise"` stops at the first.

        Raises:
            DatasetError: with `"raise"`, or when not a single example could be read.
        """
        known = {entry.index for entry in self.skipped}
        read = failed = 0
        reason = ""
        for index in range(len(self)) if indices is None else indices:
            try:
                example = self[index]
            except DatasetError as error:
                if on_error == "raise":
                    raise
                failed, reason = failed + 1, str(error)
                if index not in known:
                    self.skipped.append(Skipped(index, reason))
                    known.add(index)
                continue
            read += 1
            yield index, example
        if failed and not read:
            raise DatasetError(f"none of {failed} examples could be read; the last one: {reason}")


class Joined(Reader[Example]):
    """Several readers one after the other, for example two splits."""

    def __init__(self, *readers: Reader[Example]) -> None:
        super().__init__()
        self.readers = readers
        self.source = tuple(path for reader in readers for path in reader.source)
        self.has_regions = all(reader.has_regions for reader in readers)

    def __len__(self) -> int:
        return sum(len(reader) for reader in self.readers)

    def load(self, index: int) -> Example:
        for reader in self.readers:
            if index < len(reader):
                return reader.load(index)
            index -= len(reader)
        raise IndexError(index)
