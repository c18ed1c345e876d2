"""What no metric may turn into a number: scores without a class, infinite relevance, mixed protocols, wrong options."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient
from torch import Tensor, nn

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.evaluation.measures import Perturbation
from captum_transformer_attr.evaluation.store import Progress, Store
from captum_transformer_attr.metrics import (
    Accumulator,
    MeanScore,
    PerturbationAUC,
    PixelRemoval,
    PointingGame,
    RationaleScores,
    SacoScores,
    SegmentationScores,
    TokenRemoval,
    bootstrap,
    box_masks,
    center_map,
    class_discriminativeness,
    completeness,
    curve_area,
    infidelity_and_sensitivity,
    mass_in_mask,
    perturbation_auc,
    perturbation_curve,
    pointing_game,
    rationale_auprc,
    saco,
    segmentation_scores,
    token_f1,
    word_scores,
)

NAN, INF = float("nan"), float("inf")
IMAGES = torch.ones(2, 1, 4, 4)
MAPS = torch.arange(32.0).view(2, 4, 4)
MASKS = MAPS % 2 == 0
INFINITE = MAPS.masked_fill(MAPS == 20, INF)
UNKNOWN = MAPS.masked_fill(MAPS == 20, NAN)


def summing(images: Tensor) -> Tensor:
    total = images.flatten(1).sum(1)
    return torch.stack([total, -total], 1)


def curve(**change: Any) -> Tensor:
    return perturbation_curve(**{"forward": summing, "inputs": IMAGES, "attributions": MAPS, "target": 0, **change})


def refuses(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(InputError, match=message):
        call()


class TestScoresOfTheModel:
    @pytest.mark.parametrize("wrong", [NAN, INF])
    @pytest.mark.parametrize("measure", ["accuracy", "probability", "logit", "sigmoid"])
    @pytest.mark.parametrize("call", [perturbation_auc, saco])
    def test_a_model_without_an_answer_is_not_right_about_class_0(
        self, wrong: float, measure: Any, call: Callable[..., Tensor]
    ) -> None:
        def forward(images: Tensor) -> Tensor:
            return torch.where(torch.tensor([[False], [True]]), wrong, summing(images))

        refuses(
            "output of forward is NaN or infinite for example 1",
            lambda: call(forward, IMAGES, MAPS, 0, measure=measure, removal="black"),
        )

    def test_a_class_may_be_ruled_out_but_not_asked_for_its_logit(self) -> None:
        def forward(images: Tensor) -> Tensor:
            return summing(images).index_fill(1, torch.tensor([1]), -INF)

        assert perturbation_auc(forward, IMAGES, MAPS, 0).tolist() == pytest.approx([90, 90])
        assert not curve(forward=forward, target=1, measure="probability").any()
        refuses("-inf for example 0: no logit", lambda: curve(forward=forward, target=1, measure="logit"))
        refuses("NaN or infinite", lambda: curve(forward=lambda images: summing(images) * -INF))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"forward": None}, "forward must be"),
            ({"forward": lambda images: summing(images)[:1]}, "for 2 examples, got \\(1, 2\\)"),
            ({"clean_scores": torch.zeros(3, 2)}, "clean_scores must be"),
            ({"clean_scores": torch.zeros(2)}, "clean_scores must be"),
            ({"clean_scores": [[0, 1]]}, "clean_scores must be a Tensor"),
            ({"clean_scores": torch.full((2, 2), NAN)}, "clean_scores is NaN"),
        ],
    )
    def test_other_shapes_are_named(self, change: dict[str, Any], message: str) -> None:
        refuses(message, lambda: curve(**change))


@pytest.mark.parametrize("maps", [INFINITE, UNKNOWN])
@pytest.mark.parametrize(
    "call",
    [
        lambda maps: curve(attributions=maps),
        lambda maps: saco(summing, IMAGES, maps, 0),
        lambda maps: pointing_game(maps, MASKS),
        lambda maps: mass_in_mask(maps, MASKS),
        lambda maps: segmentation_scores(maps, MASKS),
        lambda maps: class_discriminativeness(torch.stack([MAPS, maps], 1)),
        lambda maps: completeness(summing, IMAGES, maps, 0),
        lambda maps: completeness(summing, IMAGES, (MAPS, maps), 0),
        lambda maps: rationale_auprc(maps[1], MASKS[1]),
        lambda maps: token_f1(maps[1], MASKS[1], 1),
    ],
)
def test_relevance_that_is_not_finite(call: Callable[[Tensor], Any], maps: Tensor) -> None:
    refuses("hold NaN|hold infinite", lambda: call(maps))


AUC = {"fractions": (0, 0.5, 1)}
DIFFERENT: list[tuple[Callable[..., Accumulator], dict[str, Any], dict[str, Any], str]] = [
    (PerturbationAUC, {"order": "positive"}, {"order": "negative"}, "order"),
    (PerturbationAUC, {"measure": "accuracy"}, {"measure": "logit"}, "measure"),
    (PerturbationAUC, {"seed": 0}, {"seed": 1}, "seed"),
    (PerturbationAUC, {"fractions": (0, 0.5, 1)}, {"fractions": (0, 0.4, 1)}, "fractions"),
    (PerturbationAUC, {"removal": "black"}, {"removal": "mean"}, "removal.baseline"),
    (PerturbationAUC, {}, {"removal": PixelRemoval(mean=0.5)}, "removal.mean"),
    (PerturbationAUC, {}, {"removal": PixelRemoval(square=2)}, "removal.square"),
    (PerturbationAUC, {}, {"removal": TokenRemoval(), "fractions": PixelRemoval.fractions}, "removal"),
    (
        PerturbationAUC,
        {"removal": PixelRemoval(torch.zeros(1, 5, 5))},
        {"removal": PixelRemoval(torch.ones(1, 5, 5))},
        "removal.baseline",
    ),
    (SacoScores, {"groups": 10}, {"groups": 5}, "groups"),
    (SacoScores, {"measure": "probability"}, {"measure": "sigmoid"}, "measure"),
]


class TestProtocols:
    def each(self) -> list[tuple[Accumulator, Accumulator, str]]:
        pairs: list[tuple[Accumulator, Accumulator, str]] = [
            (kind(summing, **first), kind(summing, **second), name) for kind, first, second, name in DIFFERENT
        ]
        return [
            *pairs,
            (RationaleScores(1), RationaleScores(2), "k"),
            (RationaleScores(1), RationaleScores(1, seed=1), "seed"),
            (SegmentationScores(threshold="mean"), SegmentationScores(threshold=0.5), "threshold"),
            (
                Perturbation(PixelRemoval(), "positive").accumulator(summing),
                Perturbation(PixelRemoval("mean"), "positive").accumulator(summing),
                "removal.baseline",
            ),
        ]

    def test_other_options_are_neither_merged_nor_loaded(self) -> None:
        for first, second, name in self.each():
            refuses(f"with {name}=", lambda: first.merge(second))  # noqa: B023
            refuses(f"with {name}=", lambda: first.load_state_dict(second.state_dict()))  # noqa: B023

    def test_equal_options_are_merged_and_loaded_from_a_file(self) -> None:
        def gathering() -> PerturbationAUC:
            removal = PixelRemoval(mean=[0.5], std=[0.2], square=2)
            result = PerturbationAUC(summing, removal=removal, fractions=[0, 0.5, 1], measure="logit")
            result.update(IMAGES, MAPS, 0)
            return result

        file = io.BytesIO()
        torch.save(gathering().state_dict(), file)
        file.seek(0)
        # The same numbers written otherwise.
        removal = PixelRemoval(mean=0.5, std=torch.tensor([0.2], dtype=torch.float64), square=np.int64(2))  # type: ignore[arg-type]
        restored = PerturbationAUC(summing, removal=removal, fractions=torch.tensor([0, 0.5, 1]), measure="logit")  # type: ignore[arg-type]
        restored.load_state_dict(torch.load(file, weights_only=True))
        restored.merge(gathering())
        assert len(restored) == 4
        assert torch.equal(restored.examples()["curve"][:2], gathering().examples()["curve"])

    def test_numbers_are_copied(self) -> None:
        given = torch.ones(3, dtype=torch.float64)
        scores, loaded = MeanScore(), MeanScore()
        scores.update(a=given)
        loaded.load_state_dict({"a": given})
        given.zero_()  # a buffer that is used again
        assert scores.compute()["a"].value == loaded.compute()["a"].value == 1

    def test_columns_that_do_not_fit_are_refused_and_change_nothing(self) -> None:
        pointing = PointingGame()
        pointing.update(MAPS, MASKS)
        state = pointing.state_dict()
        refuses("shapes", lambda: pointing.load_state_dict({"x": torch.ones(2)}))
        refuses("shapes", lambda: pointing.load_state_dict({**state, "hit": state["hit"][:1]}))
        refuses("state_dict", lambda: pointing.load_state_dict(None))  # type: ignore[arg-type]
        areas = PerturbationAUC(summing, **AUC)
        refuses("shapes", lambda: areas.load_state_dict({"curve": torch.ones(2, 5)}))
        scores, other = MeanScore(), MeanScore()
        scores.update(a=torch.ones(2))
        other.update(b=torch.ones(2))
        refuses("shapes", lambda: scores.merge(other))
        assert len(pointing) == 2
        assert torch.equal(pointing.examples()["hit"], state["hit"])

    def test_files_of_earlier_runs_go_on(self, tmp_path: Path) -> None:
        # Format: header and "measure/column" arrays alone; what the options are is the description's business.
        areas = PerturbationAUC(summing, **AUC)
        areas.update(IMAGES, MAPS, 0)
        Store(tmp_path).save({"task": "t"}, "m", Progress({"auc": areas}, done=2))
        (file,) = tmp_path.rglob("*.npz")
        with np.load(file) as content:
            assert sorted(content.files) == ["auc/curve", "header"]
        again = Progress({"auc": PerturbationAUC(summing, **AUC)})
        Store(tmp_path).load({"task": "t"}, "m", again)
        assert torch.equal(again.accumulators["auc"].examples()["curve"], areas.examples()["curve"])


class TestPixelNormalisation:
    def test_of_another_number_of_channels(self) -> None:
        seen = []

        def forward(images: Tensor) -> Tensor:
            seen.append(images.shape)
            return summing(images)

        for wrong in ({"mean": [0.5, 0.4, 0.3]}, {"std": [0.2, 0.2, 0.2]}):
            removal = PixelRemoval(**wrong)  # type: ignore[arg-type]
            refuses("cannot be expanded to images", lambda: curve(forward=forward, removal=removal))  # noqa: B023
        refuses("baseline of shape", lambda: curve(removal=PixelRemoval(torch.zeros(5))))
        assert not seen
        colour = curve(inputs=torch.ones(2, 3, 4, 4), removal=PixelRemoval(mean=[0.5, 0.4, 0.3], std=0.1))
        assert colour.shape == (2, 10)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"std": 0.0}, "std must be positive"),
            ({"std": [0.2, -0.1, 0.2]}, "std must be positive"),
            ({"mean": "a"}, "mean must be"),
            ({"mean": NAN}, "mean must be finite"),
            ({"blur": (2, 1.0)}, "blur"),
            ({"blur": (3, 0)}, "blur"),
            ({"blur": 3}, "blur"),
            ({"blur": (3.5, 1.0)}, "blur"),
            ({"square": 1.5}, "square"),
            ({"baseline": None}, "baseline"),
        ],
    )
    def test_options_that_mean_nothing(self, options: dict[str, Any], message: str) -> None:
        refuses(message, lambda: PixelRemoval(**options))


def tokens_of(**entries: Any) -> Any:
    return TokenRemoval().prepare({"input_ids": torch.ones(2, 4, dtype=torch.long), **entries}, torch.rand(2, 4))


def captum_scores(**options: Any) -> Any:
    return infidelity_and_sensitivity(InputXGradient(nn.Linear(3, 2)), torch.ones(2, 3), 1, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: segmentation_scores(MAPS[:0], MASKS[:0]), "attributions hold no example"),
        (lambda: segmentation_scores(MAPS, MASKS, valid=(MAPS > 15)), "valid leaves no pixel of example 0"),
        (lambda: segmentation_scores(MAPS, MASKS, valid=MASKS[:, :2]), "valid must be"),
        (lambda: segmentation_scores(MAPS, MASKS, threshold=NAN), "threshold must be"),
        (lambda: curve_area(torch.ones(2, 3), [0, 1]), "curve must be \\(N, 2\\)"),
        (lambda: curve(fractions=[0, NAN, 1]), "fractions must be finite"),
        (lambda: curve(fractions=0.5), "fractions must be"),
        (lambda: curve(removal=None), "removal must be"),
        (lambda: saco(summing, IMAGES, MAPS, 0, removal=None), "removal must be"),  # type: ignore[arg-type]
        (lambda: saco(summing, IMAGES, MAPS, 0, groups=2.5), "groups must be"),  # type: ignore[arg-type]
        (lambda: curve(inputs=()), "images must be"),
        (lambda: curve(attributions=()), "attributions must be"),
        (lambda: completeness(None, IMAGES, MAPS, total=torch.ones(3)), "total must be .* 2 examples"),
        (lambda: completeness(None, IMAGES, MAPS, total=1, elsewhere=torch.ones(3)), "elsewhere must be"),
        (lambda: completeness(summing, IMAGES, None, 0), "attributions must be a Tensor"),
        (lambda: completeness(summing, None, MAPS, 0), "inputs must be"),  # type: ignore[arg-type]
        (lambda: mass_in_mask(MAPS.tolist(), MASKS), "attributions must be a Tensor, got list"),  # type: ignore[arg-type]
        (lambda: MeanScore().update(a=[1, 2]), "a must be a Tensor, got list"),  # type: ignore[arg-type]
        (lambda: TokenRemoval("mask", mask_token="[MASK]"), "mask_token"),  # type: ignore[arg-type]
        (lambda: TokenRemoval(keep=5), "keep must be"),  # type: ignore[arg-type]
        (lambda: PerturbationAUC(summing, order="x"), "order must be"),  # type: ignore[arg-type]
        (lambda: PerturbationAUC(summing, measure="x"), "measure must be"),  # type: ignore[arg-type]
        (lambda: SacoScores(summing, groups=1), "groups must be"),
        (lambda: token_f1([[1, 2]], [[1, 0]], 1.5), "k must be a whole number"),  # type: ignore[arg-type]
        (lambda: token_f1(["ab"], ["01"]), "document 0: scores and rationale must be numbers"),  # type: ignore[list-item]
        (lambda: token_f1([[1, 2]], [None]), "document 0: scores and rationale"),  # type: ignore[list-item]
        (lambda: token_f1(None, None), "scores and rationales must be sequences"),  # type: ignore[arg-type]
        (lambda: word_scores([1.0], [0], "1"), "count must be a whole number"),  # type: ignore[arg-type]
        (lambda: word_scores("a", [0], 1), "scores must be numbers"),  # type: ignore[arg-type]
        (lambda: curve(seed="0"), "seed must be a whole number"),
        (lambda: curve(attributions=MAPS.to(torch.complex64)), "attributions must be real"),
        (lambda: curve(attributions=MAPS[:, :0]), "there is no pixel"),
        (lambda: curve(inputs=IMAGES.byte(), removal="mean"), "images must be floating"),
        (lambda: box_masks("abcd", (4, 4)), "boxes must be"),  # type: ignore[arg-type]
        (lambda: box_masks([[0, 0, 1, 1]], 4), "size must be height and width"),  # type: ignore[arg-type]
        (lambda: center_map(4), "size must be height and width"),  # type: ignore[arg-type]
        (lambda: class_discriminativeness(MAPS[:, None].repeat(1, 2, 1, 1), torch.tensor(1)), "masks must be"),
        (lambda: bootstrap(["a"]), "values must hold"),  # type: ignore[arg-type]
        (lambda: bootstrap(torch.tensor(1.0)), "values must hold"),
        (lambda: bootstrap([1.0, 2.0], seed=-1), "seed must be at least 0"),  # type: ignore[arg-type]
        (lambda: bootstrap([1.0, 2.0], resamples=1.5), "resamples must be"),  # type: ignore[arg-type]
        (lambda: bootstrap([1.0, 2.0], confidence="0.9"), "confidence must lie"),  # type: ignore[arg-type]
        (lambda: MeanScore().load_state_dict({"a": MAPS, "protocol": MAPS}), "damaged entry 'protocol'"),
        (lambda: TokenRemoval(along=5), "along must be"),  # type: ignore[arg-type]
        (lambda: tokens_of(attention_mask=torch.ones(2, 3)), "'attention_mask', got \\(2, 3\\)"),
        (lambda: tokens_of(attention_mask=None), "'attention_mask', got NoneType"),
        (lambda: tokens_of(special_tokens_mask=[[0] * 4] * 2), "'special_tokens_mask', got list"),
        (lambda: tokens_of(token_type_ids=torch.ones(2, 3)), "'token_type_ids', got \\(2, 3\\)"),
        (lambda: TokenRemoval().prepare("abcd", MAPS), "inputs must be a tensor or a mapping"),  # type: ignore[arg-type]
        (lambda: captum_scores(noise=-1.0), "noise must be a number of at least 0"),
        (lambda: captum_scores(radius="1"), "radius must be a number"),
        (lambda: captum_scores(attributions=torch.full((2, 3), NAN)), "attributions of example 0 hold NaN"),
    ],
)
def test_argument_is_named(call: Callable[[], Any], message: str) -> None:
    refuses(message, call)


def test_no_samples() -> None:
    method = InputXGradient(nn.Linear(3, 2))
    refuses("samples must be at least 1", lambda: infidelity_and_sensitivity(method, torch.ones(2, 3), 1, samples=0))


def test_whole_numbers_of_other_libraries() -> None:
    scores, rationales = [[0.1, 0.9, 0.5]], [[0, 1, 1]]
    for k in (np.int64(2), torch.tensor(2), np.array([2]), [np.int32(2)]):
        assert token_f1(scores, rationales, k).tolist() == [[1.0]]
        assert RationaleScores(k).k == (2,)
