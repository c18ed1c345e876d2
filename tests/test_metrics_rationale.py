"""Agreement with human rationales: hand-computed documents, perfect, random and inverted scores."""

from __future__ import annotations

import pytest
import torch

from captum_transformer_attr.metrics import RationaleScores, rationale_auprc, token_f1, word_scores

INF = float("inf")


def test_token_f1_by_hand() -> None:
    scores, rationale = [0.9, 0.1, 0.8, 0.2], [1, 0, 0, 1]
    # k = 1: {0}: precision 1, recall 1/2. k = 2: {0, 2}: 1/2, 1/2. k = 3: {0, 2, 3}: 2/3, 1. k = 9: all: 1/2, 1.
    wanted = [2 / 3, 0.5, 0.8, 2 / 3]
    assert token_f1([scores], [rationale], (1, 2, 3, 9)).tolist() == [pytest.approx(wanted)]
    assert token_f1([scores], [rationale], 2).tolist() == [[0.5]]


def test_documents_of_different_lengths_and_tensors() -> None:
    scores = [torch.tensor([0.9, 0.1]), [0.3, 0.2, 0.1]]
    assert token_f1(scores, [[1, 0], torch.tensor([0, 0, 1])], 1).tolist() == [[1], [0]]


def test_auprc_by_hand() -> None:
    scores, rationale = [0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0]
    # Recall 1/2 at precision 1, recall 1 at precision 2/3.
    assert rationale_auprc([scores], [rationale]).item() == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    # Trapezoids of ERASER's script: points (recall, precision) (0, 1), (1/2, 1), (1/2, 1/2), (1, 2/3), (1, 1/2).
    linear = rationale_auprc([scores], [rationale], interpolation="linear").item()
    assert linear == pytest.approx(0.5 * 1 + 0.5 * (1 / 2 + 2 / 3) / 2)


def test_constant_scores() -> None:
    rationale = [1] + [0] * 9
    assert rationale_auprc([[0.5] * 10], [rationale]).item() == pytest.approx(0.1)
    assert rationale_auprc([[0.5] * 10], [rationale], interpolation="linear").item() == pytest.approx(0.55)
    # Chosen by the seed, not by position: over many seeds the first word is among 3 of 10 as often as any other.
    found = sum(token_f1([[0.5] * 10], [rationale], 3, seed=seed).item() > 0 for seed in range(200))
    assert 35 < found < 90


def test_words_cut_off_are_never_selected_but_count_in_the_rationale() -> None:
    scores, rationale = [0.9, -0.2, -INF, -INF], [1, 0, 0, 1]
    # Only two words can be selected: k = 3 gives {0, 1}, precision 1/2, recall 1/2.
    assert token_f1([scores], [rationale], 3).item() == pytest.approx(0.5)
    # The lost words share the last place: precision 1 at recall 1/2, then 2 of 4.
    assert rationale_auprc([scores], [rationale]).item() == pytest.approx(0.5 * 1 + 0.5 * 0.5)
    assert rationale_auprc([[-INF, -INF]], [[1, 0]]).item() == pytest.approx(0.5)


def test_words_cut_off_stand_behind_scores_of_any_size() -> None:
    scores = [-1e17, float("-inf")]  # 1 less is the same number
    assert rationale_auprc([scores], [[0, 1]]).tolist() == [0.5]
    assert rationale_auprc([scores], [[1, 0]]).tolist() == [1]


def test_perfect_random_and_inverted() -> None:
    generator = torch.Generator().manual_seed(0)
    rationales = (torch.rand(100, 60, generator=generator) < 0.2).int()
    rationales[:, 0] = 1
    random = torch.rand(100, 60, generator=generator)
    perfect, inverted = rationales.double(), -rationales.double()
    assert (rationale_auprc(perfect, rationales) == 1).all()
    k = 12
    f1 = {n: token_f1(s, rationales, k).mean() for n, s in [("p", perfect), ("r", random), ("i", inverted)]}
    area = {n: rationale_auprc(s, rationales).mean() for n, s in [("r", random), ("i", inverted)]}
    assert f1["p"] > 0.85 > 0.3 > f1["r"] > 0.1 > 0.01 > f1["i"]
    assert area["r"].item() == pytest.approx(rationales.double().mean().item(), abs=0.05)
    assert area["i"] < area["r"]


def test_document_without_rationale_is_undefined_and_counted() -> None:
    scores = RationaleScores(k=(1, 2))
    scores.update([[0.9, 0.1], [0.9, 0.1]], [[1, 0], [0, 0]])
    result = scores.compute()
    assert (result["token_f1"][1].value, result["token_f1"][1].count, result["token_f1"][1].skipped) == (1, 1, 1)
    assert result["token_f1"][2].value == pytest.approx(2 / 3)
    assert (result["auprc"].value, result["auprc"].skipped) == (1, 1)


def test_words_from_pieces_by_hand() -> None:
    scores, words = [9.0, 0.1, 0.5, 0.2, -0.3, 9.0], [None, 0, 0, 1, 1, None]
    assert word_scores(scores, words, 3).tolist() == [0.5, 0.2, -INF]
    assert word_scores(scores, words, 2, reduce="sum").tolist() == pytest.approx([0.6, -0.1])
    assert word_scores(scores, words, 2, reduce="mean").tolist() == pytest.approx([0.3, -0.05])
    assert word_scores([-1.0], [0], 1).tolist() == [-1]


@pytest.mark.parametrize(
    ("scores", "rationales", "message"),
    [
        ([[0.1, 0.2]], [[1]], "document 0"),
        ([[0.1, float("nan")]], [[1, 0]], "document 0 hold NaN"),
        ([[0.1, 0.2]], [[1, 2]], "other values"),
        ([[0.1]], [[1], [0]], "1 documents"),
    ],
)
def test_bad_input(scores: list, rationales: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_f1(scores, rationales)
    with pytest.raises(ValueError, match=message):
        rationale_auprc(scores, rationales)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="k must be positive"):
        token_f1([[0.1]], [[1]], 0)
    with pytest.raises(ValueError, match="interpolation"):
        rationale_auprc([[0.1]], [[1]], interpolation="cubic")
    with pytest.raises(ValueError, match="reduce"):
        word_scores([0.1], [0], 1, reduce="min")
    with pytest.raises(ValueError, match="1 scores for 2 tokens"):
        word_scores([0.1], [0, 1], 1)
    with pytest.raises(ValueError, match="words holds 5, but the text has 2 words"):
        word_scores([0.1, 0.2], [0, 5], 2)
