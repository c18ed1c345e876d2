"""The measure of agreement with the words that people marked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from captum_transformer_attr.evaluation.batch import Batch
from captum_transformer_attr.evaluation.measures.measure import Column, Explain, Forward, OneClassMeasure, entry_scores
from captum_transformer_attr.metrics import RationaleScores, word_scores


@dataclass(frozen=True)
class Rationale(OneClassMeasure):
    """Token F1 and AUPRC against human rationales; the score of a word is the highest of its pieces."""

    k: tuple[int, ...]
    role: str = "label"
    entry: str = "input_ids"
    name: str = "rationale"

    def accumulator(self, forward: Forward) -> RationaleScores:
        return RationaleScores(self.k)

    def update(self, accumulator: RationaleScores, batch: Batch, maps: Mapping[str, Any], explain: Explain) -> None:
        assert batch.words is not None
        rows = entry_scores(maps[self.role], self.entry)
        words, texts = batch.words, range(len(batch))
        scores = [word_scores(rows[i], words.of_tokens[i], words.count[i]) for i in texts]
        accumulator.update(scores, words.rationales)

    def columns(self, accumulator: RationaleScores, seed: int) -> list[Column]:
        result = accumulator.compute(seed=seed)
        by_k = [Column(f"F1@{k}", "higher", estimate) for k, estimate in result["token_f1"].items()]
        return [Column("AUPRC", "higher", result["auprc"]), *by_k]
