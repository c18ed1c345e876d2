"""Stanford Sentiment Treebank: the GLUE development set, and sentences with the rationales of several annotators."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from captum_transformer_attr.datasets.errors import DatasetError
from captum_transformer_attr.datasets.examples import TextExample
from captum_transformer_attr.datasets.files import decode_text, parse_json_lines, read_file
from captum_transformer_attr.datasets.reader import Reader


class Sst2(Reader[TextExample]):
    """SST-2 sentences (Socher et al., EMNLP 2013; GLUE), labels "0" (negative) and "1" (positive).

    Args:
        path: `dev.tsv` with a header that names `label` and `sentence` (GLUE) or `content`.

    Raises:
        DatasetError: the file is missing, the header or a line is of another format.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        text = _text(Path(path))
        lines = [line.removesuffix("\r").split("\t") for line in text.removesuffix("\n").split("\n")]
        header = lines[0]
        column = next((name for name in ("sentence", "content") if name in header), None)
        if column is None or "label" not in header:
            raise DatasetError(f"the first line of {path} does not name the columns label and sentence")
        self._rows: list[tuple[str, str]] = []
        for number, line in enumerate(lines[1:], 2):
            if len(line) != len(header) or line[header.index("label")] not in ("0", "1"):
                raise DatasetError(f"line {number} of {path} is not a label 0 or 1 and a sentence")
            self._rows.append((line[header.index(column)], line[header.index("label")]))

    def __len__(self) -> int:
        return len(self._rows)

    def load(self, index: int) -> TextExample:
        sentence, label = self._rows[index]
        return TextExample(f"sst2:{index}", tuple(sentence.split()), label)


class SstRationales(Reader[TextExample]):
    """SST sentences with word rationales by about six annotators (Thorn Jakobsen et al., ACL 2023).

    Args:
        path: a file of lines `{"sentence", "gold_label", "annotations": [{"label", "rationale": [0, 1, ...]}, ...]}`.
        agreement: a word belongs to the rationale if at least this share of the annotators who gave the gold label
            marked it. Those who read the sentence otherwise have given reasons for something else.

    A sentence without a rationale by this rule has an empty one: rationale metrics count it as skipped.

    Raises:
        DatasetError: the file is missing or damaged.
    """

    def __init__(self, path: str | Path, *, agreement: float = 0.5) -> None:
        super().__init__(path)
        self.path = Path(path)
        self.agreement = agreement
        self._rows = parse_json_lines(_text(self.path), self.path)

    def __len__(self) -> int:
        return len(self._rows)

    def load(self, index: int) -> TextExample:
        number, row = self._rows[index]
        try:
            words, label = tuple(str(row["sentence"]).split()), str(row["gold_label"])
            votes = [a["rationale"] for a in row["annotations"] if a["label"] == label]
            if any(len(vote) != len(words) for vote in votes):
                raise ValueError("a rationale is not as long as the sentence")
            marked = np.array(votes, dtype=float).reshape(-1, len(words))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DatasetError(f"line {number} of {self.path} is not an annotated sentence: {error!r}") from error
        share = marked.mean(axis=0) if len(marked) else np.zeros(len(words))
        return TextExample(f"sst:{index}", words, label, (share >= self.agreement) & (share > 0))


def _text(path: Path) -> str:
    return decode_text(read_file(path), path)
