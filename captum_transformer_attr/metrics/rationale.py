"""Agreement with human rationales (DeYoung et al., "ERASER", ACL 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.metrics._inputs import whole_number
from captum_transformer_attr.metrics.accumulator import Accumulator, Bootstrap
from captum_transformer_attr.metrics.ranking import ranks

Words: TypeAlias = Sequence[float] | np.ndarray | Tensor

ERASER_K = (10, 20, 30, 40, 50, 60, 70, 80)
"""Numbers of words selected by Chefer et al., CVPR 2021, on the ERASER movie reviews."""


def token_f1(
    scores: Sequence[Words] | Tensor,
    rationales: Sequence[Words] | Tensor,
    k: int | Sequence[int] = ERASER_K,
    *,
    seed: int = 0,
) -> Tensor:
    """F1 of the k highest words against the rationale, per document (CVPR 2021, section 4, ERASER movies).

    Args:
        scores: one sequence of word scores per document (see `word_scores` for word pieces). -inf marks a word without
            a score, because the text was cut before it: it is never selected, but counts where it is in the rationale.
        rationales: one sequence of 0 and 1 per document, of the same lengths.
        k: how many words are selected, or several such numbers.
        seed: orders words of equal score, see `ranks`.

    Returns:
        (N, len(k)); NaN for a document without rationale.

    Raises:
        InputError: lengths that differ (the document is named), NaN scores.
    """
    from sklearn.metrics import f1_score

    wanted = _numbers_of_words(k)
    rows = []
    for values, truth in _documents(scores, rationales):
        places = ranks(values[None], seed=seed)[0]
        scored = values > float("-inf")
        selected = [((places < number) & scored).numpy() for number in wanted]
        defined = truth.any()
        rows.append([f1_score(truth, s, zero_division=0) if defined else float("nan") for s in selected])
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, len(wanted))


def rationale_auprc(
    scores: Sequence[Words] | Tensor,
    rationales: Sequence[Words] | Tensor,
    *,
    interpolation: Literal["step", "linear"] = "step",
) -> Tensor:
    """Area under the precision-recall curve of the word scores, per document.

    Args:
        scores, rationales: as in `token_f1`.
        interpolation: `"step"` is average precision; `"linear"` the trapezoid area that ERASER's own script computes.
            The latter gives a constant score (1 + rationale share) / 2, so it flatters scores with many ties.

    Returns:
        (N,); NaN for a document without rationale. A constant score has the rationale's share of the words ("step").
    """
    from sklearn.metrics import auc, average_precision_score, precision_recall_curve

    if interpolation not in ("step", "linear"):
        raise InputError(f'interpolation must be "step" or "linear", got "{interpolation}"')
    areas = []
    for values, truth in _documents(scores, rationales):
        if not truth.any():
            areas.append(float("nan"))
            continue
        finite = values[values > float("-inf")]
        # The next smaller number: minus 1 would be the same number again where scores are large.
        floor = np.nextafter(float(finite.min()), -np.inf) if len(finite) else 0.0
        ordered = values.clamp(min=floor).numpy()
        if interpolation == "step":
            areas.append(float(average_precision_score(truth, ordered)))
        else:
            precision, recall, _ = precision_recall_curve(truth, ordered)
            areas.append(float(auc(recall, precision)))
    return torch.tensor(areas, dtype=torch.float64)


def word_scores(scores: Words, words: Sequence[int | None], count: int, *, reduce: str = "max") -> Tensor:
    """Scores of whole words from those of their pieces.

    Args:
        scores: (T,), one per token.
        words: (T,), the index of each token's word, None for special tokens; a fast tokenizer's `word_ids()`.
        count: number of words of the text.
        reduce: `"max"` (as published), `"sum"` or `"mean"` over the pieces.

    Returns:
        (count,) float64; -inf for a word none of whose pieces was scored.
    """
    count = whole_number(count, "count", 0)
    try:
        values = torch.as_tensor(scores, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError) as error:
        raise InputError(f"scores must be numbers, one per token ({error})") from error
    if len(values) != len(words):
        raise InputError(f"{len(values)} scores for {len(words)} tokens")
    if reduce not in ("max", "sum", "mean"):
        raise InputError(f'reduce must be "max", "sum" or "mean", got "{reduce}"')
    unknown = next((word for word in words if word is not None and not 0 <= word < count), None)
    if unknown is not None:
        raise InputError(f"words holds {unknown}, but the text has {count} words, 0 to {count - 1}")
    pieces = [i for i, word in enumerate(words) if word is not None]
    index = torch.tensor([words[i] for i in pieces], dtype=torch.long)
    result = torch.full((count,), float("-inf"), dtype=torch.float64)
    name = {"max": "amax"}.get(reduce, reduce)
    return result.scatter_reduce(0, index, values[pieces], name, include_self=False)


def _numbers_of_words(k: Any) -> tuple[int, ...]:
    """One or several positive numbers, of whatever library."""
    wanted = tuple(whole_number(number, "k") for number in (k if np.ndim(k) else [k]))
    if not wanted or min(wanted) < 1:
        raise InputError(f"k must be positive, got {k}")
    return wanted


def _documents(scores: Any, rationales: Any) -> list[tuple[Tensor, np.ndarray]]:
    if not all(hasattr(given, "__len__") for given in (scores, rationales)):
        raise InputError("scores and rationales must be sequences with an entry per document")
    if len(scores) != len(rationales):
        raise InputError(f"{len(scores)} documents have scores, {len(rationales)} have rationales")
    documents = []
    for number, (values, truth) in enumerate(zip(scores, rationales, strict=True)):
        try:
            row = torch.as_tensor(values).detach().double().cpu()
            mask = torch.as_tensor(truth).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"document {number}: scores and rationale must be numbers ({error})") from error
        if row.ndim != 1 or row.shape != mask.shape:
            raise InputError(f"document {number}: {tuple(row.shape)} scores for {tuple(mask.shape)} rationale values")
        if row.isnan().any() or (row == float("inf")).any():
            raise InputError(f"scores of document {number} hold NaN or inf; only -inf has a meaning, not scored")
        if not ((mask == 0) | (mask == 1)).all():
            raise InputError(f"the rationale of document {number} holds other values than 0 and 1")
        documents.append((row, mask.bool().numpy()))
    return documents


class RationaleScores(Accumulator):
    """Token F1 at every k and the area under the precision-recall curve over a stream of documents.

    `compute` returns `token_f1`, a dictionary from k to `Estimate`, and `auprc`.
    """

    def __init__(self, k: int | Sequence[int] = ERASER_K, *, seed: int = 0) -> None:
        super().__init__()
        self.k = _numbers_of_words(k)
        self.seed = seed

    def protocol(self) -> dict[str, Any]:
        return {"k": self.k, "seed": self.seed}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"f1": (len(self.k),), "auprc": ()}

    def update(self, scores: Sequence[Words] | Tensor, rationales: Sequence[Words] | Tensor) -> None:
        """Adds documents."""
        self._add(f1=token_f1(scores, rationales, self.k, seed=self.seed), auprc=rationale_auprc(scores, rationales))

    def _summary(self, estimate: Bootstrap) -> dict[str, Any]:
        by_k = dict(zip(self.k, estimate(self._column("f1")), strict=True))
        return {"token_f1": by_k, "auprc": estimate(self._column("auprc"))[0]}
