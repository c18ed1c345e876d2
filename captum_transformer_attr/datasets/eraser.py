"""The ERASER benchmark (DeYoung et al., ACL 2020): documents with the spans that people based the label on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from captum_transformer_attr.datasets.errors import DatasetError
from captum_transformer_attr.datasets.examples import TextExample
from captum_transformer_attr.datasets.files import FileStore, parse_json_lines
from captum_transformer_attr.datasets.reader import Reader


class Eraser(Reader[TextExample]):
    """One split of any ERASER data set (movies, boolq, multirc, fever, evidence_inference, cose, esnli, scifact).

    Args:
        path: the unpacked data set, a folder or archive with `<split>.jsonl` and either `docs/`, a file per
            document, or `docs.jsonl`.
        split: `"train"`, `"val"` or `"test"`.

    Words are the document's white-space separated tokens, as the evidence spans count them; documents that the
    evidence of an example names are joined in the order of their ids. Every span is compared with the text it quotes:
    an example whose spans do not fit is refused by name rather than used with a shifted rationale. (The published files
    hold a few empty spans; they mark nothing.)

    Raises:
        DatasetError: a file is missing or damaged.
    """

    def __init__(self, path: str | Path, split: str = "test") -> None:
        super().__init__(path, Path(path) / split)
        self.store = FileStore(path)
        names = self.store.names()
        self._name = self.store.find(f"{split}.jsonl")
        folder = str(Path(self._name).parent.as_posix())
        self._folder = "" if folder == "." else folder + "/"
        self._rows = parse_json_lines(self.store.text(self._name), self.store.path / self._name)
        self._documents: dict[str, str] | None = None
        joint = self._folder + "docs.jsonl"
        if joint in names:
            rows = parse_json_lines(self.store.text(joint), self.store.path / joint)
            self._documents = {str(row.get("docid")): str(row.get("document")) for _, row in rows}
        elif not any(name.startswith(self._folder + "docs/") for name in names):
            raise DatasetError(f"{self.store.path / self._folder} holds neither docs/ nor docs.jsonl")

    def __len__(self) -> int:
        return len(self._rows)

    def load(self, index: int) -> TextExample:
        number, row = self._rows[index]
        where = f"line {number} of {self.store.path / self._name}"
        try:
            spans = [span for group in row["evidences"] for span in group]
            label, name = str(row["classification"]), str(row["annotation_id"])
            documents = sorted({str(span["docid"]) for span in spans}) or list(map(str, row.get("docids") or [name]))
            return self._example(name, label, str(row.get("query") or ""), documents, spans)
        except DatasetError as error:
            raise DatasetError(f"{where}: {error}") from error
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DatasetError(f"{where} is not an ERASER annotation: {error!r}") from error

    def _example(
        self, name: str, label: str, query: str, documents: list[str], spans: list[dict[str, Any]]
    ) -> TextExample:
        words: list[str] = []
        start = {}
        for document in documents:
            start[document] = len(words)
            words += self._document(document).split()
        rationale = np.zeros(len(words), dtype=bool)
        for span in spans:
            first = start[str(span["docid"])] + int(span["start_token"])
            last = start[str(span["docid"])] + int(span["end_token"])
            if not 0 <= first <= last <= len(words) or " ".join(words[first:last]).split() != str(span["text"]).split():
                raise DatasetError(f"evidence {span['text']!r} does not stand at its place in {span['docid']}")
            rationale[first:last] = True
        return TextExample(name, tuple(words), label, rationale, query)

    def _document(self, name: str) -> str:
        if self._documents is None:
            return self.store.text(f"{self._folder}docs/{name}")
        if name not in self._documents:
            raise DatasetError(f"document {name} is not in docs.jsonl")
        return self._documents[name]
