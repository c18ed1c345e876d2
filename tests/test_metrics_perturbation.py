"""Perturbation curves, their area and SaCo, on models whose answer to every removal is known by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from captum_transformer_attr.metrics import (
    PerturbationAUC,
    PixelRemoval,
    TokenRemoval,
    curve_area,
    perturbation_auc,
    perturbation_curve,
    ranks,
    saco,
)

WEIGHT = torch.tensor([[4.0, 3.0], [2.0, 1.0]])


def weighing(images: Tensor) -> Tensor:
    """Class 1 holds the weighted sum of the pixels (10 for white), class 0 stands at 4.5."""
    score = (images * WEIGHT.to(images)).sum((1, 2, 3))
    return torch.stack([torch.full_like(score, 4.5), score], dim=1)


WHITE = torch.ones(1, 1, 2, 2)
QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)


class TestRanks:
    def test_by_hand(self) -> None:
        scores = torch.tensor([[0.1, 0.9, 0.5], [3.0, 1.0, 2.0]])
        assert ranks(scores).tolist() == [[2, 0, 1], [0, 2, 1]]
        assert ranks(scores, descending=False).tolist() == [[0, 2, 1], [2, 0, 1]]

    def test_units_that_stay_are_ranked_behind_all_others(self) -> None:
        scores = torch.tensor([[9.0, 1.0, float("-inf"), 2.0]])
        removable = torch.tensor([[False, True, True, True]])
        assert ranks(scores, removable=removable).tolist() == [[4, 1, 2, 0]]
        assert ranks(scores, removable=removable, descending=False).tolist() == [[4, 1, 0, 2]]

    def test_ties_follow_the_seed_and_not_the_position_or_the_batch(self) -> None:
        constant = torch.zeros(2, 1000)
        first = ranks(constant, seed=1)
        assert torch.equal(first[0], first[1])
        assert torch.equal(first, ranks(constant, seed=1))
        assert not torch.equal(first, ranks(constant, seed=2))
        assert sorted(first[0].tolist()) == list(range(1000))
        # What is taken first is spread over the whole row: reading order would have a mean position of 50.
        assert 400 < (first[0] < 100).nonzero().double().mean() < 600


class TestPixels:
    def test_curve_by_hand(self) -> None:
        # Removing 4, 3, 2, 1 leaves 10, 6, 3, 1, 0; class 1 wins while more than 4.5 is left.
        curve = perturbation_curve(weighing, WHITE, WEIGHT[None], 1, fractions=QUARTERS)
        assert curve.tolist() == [[1, 1, 0, 0, 0]]
        logits = perturbation_curve(weighing, WHITE, WEIGHT[None], 1, fractions=QUARTERS, measure="logit")
        assert logits.tolist() == [[10, 6, 3, 1, 0]]
        # Removing 1, 2, 3, 4 leaves 10, 9, 7, 4, 0.
        negative = perturbation_curve(
            weighing, WHITE, WEIGHT[None], 1, fractions=QUARTERS, measure="logit", order="negative"
        )
        assert negative.tolist() == [[10, 9, 7, 4, 0]]

    def test_probability_is_the_softmax_of_the_target(self) -> None:
        curve = perturbation_curve(weighing, WHITE, WEIGHT[None], 0, fractions=(0, 1), measure="probability")
        e = torch.tensor([4.5, 10.0]).exp()
        assert curve[0, 0].item() == pytest.approx((e[0] / e.sum()).item(), rel=1e-6)
        assert curve[0, 1].item() == pytest.approx(1 / (1 + torch.tensor(-4.5).exp().item()), rel=1e-6)

    def test_area_by_hand(self) -> None:
        # Trapezoids over steps of 1/4: (1 + 1)/2 + (1 + 0)/2 = 1.5, times 25.
        area = perturbation_auc(weighing, WHITE, WEIGHT[None], 1, fractions=QUARTERS)
        assert area.tolist() == [pytest.approx(37.5)]
        assert curve_area(torch.ones(1, 10), [i / 10 for i in range(10)]).item() == pytest.approx(90)

    def test_perfect_random_and_inverted_are_told_apart(self) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.rand(8, 8, generator=generator)

        def forward(images: Tensor) -> Tensor:
            score = (images[:, 0] * weight).mean((1, 2))
            return torch.stack([torch.full_like(score, 0.25), score], dim=1)

        images = torch.ones(50, 1, 8, 8)
        maps = {
            "perfect": weight.expand(50, 8, 8),
            "random": torch.rand(50, 8, 8, generator=generator),
            "inverted": -weight.expand(50, 8, 8),
        }
        options = {"target": 1, "measure": "logit"}
        positive = {name: perturbation_auc(forward, images, m, **options).mean() for name, m in maps.items()}
        negative = {
            name: perturbation_auc(forward, images, m, order="negative", **options).mean() for name, m in maps.items()
        }
        assert positive["perfect"] < positive["random"] < positive["inverted"]
        assert negative["perfect"] > negative["random"] > negative["inverted"]
        # Random removal lowers the score in proportion: the mean weight times the area under 1 - x from 0 to 0.9.
        expected = 100 * weight.mean() * (0.9 - 0.9**2 / 2)
        assert positive["random"] == pytest.approx(expected.item(), rel=0.03)
        # Removing nothing but the inverse order is the mirror: positive of the one is negative of the other.
        assert positive["inverted"] == pytest.approx(negative["perfect"].item(), rel=1e-6)

    def test_published_rounding_of_the_number_of_pixels(self) -> None:
        removed = PixelRemoval().prepare(torch.ones(1, 1, 2, 5), torch.rand(1, 2, 5))
        assert [int(removed.count(i / 10)) for i in range(10)] == list(range(10))
        large = PixelRemoval().prepare(torch.ones(1, 1, 224, 224), torch.rand(1, 224, 224))
        assert [int(large.count(i / 10)) for i in range(10)] == [int(50176 * (i / 10)) for i in range(10)]

    def test_black_is_black_before_normalising(self) -> None:
        mean, std = [0.5, 0.2, 0.1], [0.5, 0.4, 0.2]
        image = torch.rand(1, 3, 2, 2)
        normalised = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        units = PixelRemoval("black", mean=mean, std=std).prepare(normalised, torch.rand(1, 2, 2))
        changed = units.remove(torch.tensor([[True, False, False, False]]))
        restored = changed * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
        assert restored[0, :, 0, 0].tolist() == pytest.approx([0, 0, 0], abs=1e-6)
        assert torch.allclose(restored[0, :, 1], image[0, :, 1])

    def test_mean_blur_and_given_baselines(self) -> None:
        pytest.importorskip("torchvision")
        image = torch.rand(2, 3, 16, 16)
        everything = torch.ones(2, 256, dtype=torch.bool)
        maps = torch.rand(2, 16, 16)
        mean = PixelRemoval("mean").prepare(image, maps).remove(everything)
        assert torch.allclose(mean, image.mean((2, 3), keepdim=True).expand_as(image))
        flat = PixelRemoval("blur").prepare(torch.full((2, 3, 16, 16), 0.3), maps).remove(everything)
        assert torch.allclose(flat, torch.full_like(flat, 0.3))
        blurred = PixelRemoval("blur", blur=(7, 2.0)).prepare(image, maps).remove(everything)
        assert blurred.var() < image.var() / 5
        given = PixelRemoval(torch.full((3, 1, 1), 2.0)).prepare(image, maps).remove(everything)
        assert (given == 2).all()
        with pytest.raises(ValueError, match="too large"):
            PixelRemoval("blur").prepare(torch.rand(1, 3, 4, 4), torch.rand(1, 4, 4))

    def test_patch_grid_is_interpolated_and_channels_are_summed(self) -> None:
        grid = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
        units = PixelRemoval().prepare(torch.ones(1, 1, 32, 32), grid)
        wanted = torch.nn.functional.interpolate(grid[None], scale_factor=16, mode="bilinear")[0]
        assert torch.allclose(units.scores, wanted.flatten(1))
        channels = PixelRemoval().prepare(torch.ones(1, 3, 2, 2), torch.stack([grid, grid, -grid], dim=1))
        assert torch.equal(channels.scores, grid.flatten(1))

    def test_inputs_stay_as_they_are_and_mappings_keep_their_other_entries(self) -> None:
        image = torch.rand(1, 1, 2, 2)
        before = image.clone()
        seen = {}

        def forward(pixel_values: Tensor, flag: int) -> dict[str, Tensor]:
            seen["flag"] = flag
            return {"loss": torch.zeros(()), "logits": weighing(pixel_values)}

        inputs = {"pixel_values": image, "flag": 3}
        curve = perturbation_curve(forward, inputs, {"pixel_values": WEIGHT[None]}, 1, fractions=(0, 1))
        assert torch.equal(image, before)
        assert seen["flag"] == 3
        assert curve.shape == (1, 2)

    def test_examples_do_not_see_each_other(self) -> None:
        images, maps = torch.rand(4, 1, 2, 2), torch.rand(4, 2, 2)
        together = perturbation_curve(weighing, images, maps, [1, 0, 1, 0], measure="probability")
        alone = [
            perturbation_curve(weighing, images[i : i + 1], maps[i : i + 1], [1 - i % 2], measure="probability")
            for i in range(4)
        ]
        assert torch.allclose(together, torch.cat(alone))


class TestTokens:
    IDS = torch.tensor([[101, 5, 6, 7, 8, 102], [101, 9, 10, 102, 0, 0]])
    MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    SCORES = torch.tensor([[9.0, 0.4, 0.1, 0.3, 0.2, 9.0], [9.0, 0.1, 0.2, 9.0, 9.0, 9.0]])

    def encoding(self) -> dict[str, Tensor]:
        return {"input_ids": self.IDS, "attention_mask": self.MASK, "token_type_ids": torch.arange(12).view(2, 6)}

    def test_deletion_closes_the_gap_by_hand(self) -> None:
        removal = TokenRemoval(keep=(101, 102))
        units = removal.prepare(self.encoding(), self.SCORES)
        assert units.count(0.5).tolist() == [2, 1]
        places = ranks(units.scores, removable=units.removable)
        changed = units.remove(places < units.count(0.5)[:, None])
        # The first sentence loses 5 and 7 (its highest), the second 10; both now have four or three tokens.
        assert changed["input_ids"].tolist() == [[101, 6, 8, 102], [101, 9, 102, 0]]
        assert changed["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
        assert changed["token_type_ids"].tolist() == [[0, 2, 4, 5], [6, 7, 9, 0]]

    def test_left_padding_and_positions(self) -> None:
        removal = TokenRemoval(keep=(101, 102), padding_side="left", along=())
        inputs = {
            "input_ids": torch.tensor([[101, 5, 6, 7, 8, 102], [0, 0, 101, 9, 10, 102]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]),
            "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]]),
        }
        units = removal.prepare(inputs, self.SCORES)
        removed = torch.zeros(2, 6, dtype=torch.bool)
        removed[0, 1] = removed[1, 3] = removed[1, 4] = True
        changed = units.remove(removed)
        assert changed["input_ids"].tolist() == [[101, 6, 7, 8, 102], [0, 0, 0, 101, 102]]
        assert changed["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
        assert changed["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]

    def test_masking_keeps_the_length_and_never_touches_special_or_padding_tokens(self) -> None:
        removal = TokenRemoval("mask", mask_token=103, keep=(101, 102))
        units = removal.prepare(self.encoding(), self.SCORES)
        changed = units.remove(torch.ones(2, 6, dtype=torch.bool))
        assert changed["input_ids"].tolist() == [[101, 103, 103, 103, 103, 102], [101, 103, 103, 102, 0, 0]]
        assert torch.equal(changed["attention_mask"], self.MASK)

    def test_special_tokens_mask_protects_and_is_not_handed_on(self) -> None:
        special = torch.tensor([[1, 0, 0, 0, 0, 1], [1, 0, 0, 1, 1, 1]])
        units = TokenRemoval().prepare({**self.encoding(), "special_tokens_mask": special}, self.SCORES)
        assert units.removable.tolist() == [[False, True, True, True, True, False], [False, True, True] + [False] * 3]
        assert "special_tokens_mask" not in units.remove(torch.zeros(2, 6, dtype=torch.bool))

    def test_published_rounding_keeps_the_smaller_number(self) -> None:
        ids = torch.arange(1, 37)[None]
        units = TokenRemoval().prepare(ids, torch.rand(1, 36))
        kept = [36 - int(units.count(f)) for f in (0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1)]
        assert kept == [36, 27, 18, 9, 7, 5, 3, 1, 0]
        ten = TokenRemoval().prepare(torch.arange(1, 11)[None], torch.rand(1, 10))
        assert 10 - int(ten.count(0.8)) == 2

    def test_nothing_left_is_one_pad_token(self) -> None:
        units = TokenRemoval(pad_token=77).prepare({"input_ids": torch.tensor([[5, 6]])}, torch.rand(1, 2))
        changed = units.remove(torch.ones(1, 2, dtype=torch.bool))
        assert changed["input_ids"].tolist() == [[77]]
        assert changed["attention_mask"].tolist() == [[1]]

    def test_region_features_with_their_boxes(self) -> None:
        features = torch.arange(12.0).view(1, 3, 4)
        inputs = {"input_ids": self.IDS[:1], "visual_feats": features, "visual_pos": features[..., :2]}
        removal = TokenRemoval(tokens="visual_feats", attention_mask="visual_attention_mask", along=("visual_pos",))
        units = removal.prepare(inputs, {"visual_feats": torch.tensor([[0.1, 0.9, 0.5]])})
        changed = units.remove(torch.tensor([[False, True, False]]))
        assert torch.equal(changed["visual_feats"], features[:, [0, 2]])
        assert torch.equal(changed["visual_pos"], features[:, [0, 2], :2])
        assert changed["visual_attention_mask"].tolist() == [[1, 1]]
        assert torch.equal(changed["input_ids"], self.IDS[:1])

    def test_curve_of_a_bag_of_words_by_hand(self) -> None:
        value = torch.zeros(200)
        value[5], value[6], value[7], value[8], value[9], value[10] = 4, 1, 3, 2, 1, 5

        def forward(input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
            score = (value[input_ids] * attention_mask).sum(1)
            return torch.stack([torch.zeros_like(score), score], dim=1)

        removal = TokenRemoval(keep=(101, 102))
        curve = perturbation_curve(
            forward, self.encoding(), self.SCORES, 1, removal=removal, fractions=QUARTERS, measure="logit"
        )
        # Order 5, 7, 8, 6 leaves 10, 6, 3, 1, 0. The second has two words: 10 goes with the first quarter
        # (the kept number is rounded down), 9 at three quarters.
        assert curve.tolist() == [[10, 6, 3, 1, 0], [6, 1, 1, 0, 0]]

    @pytest.mark.parametrize(
        ("removal", "inputs", "scores", "message"),
        [
            (TokenRemoval("mask"), IDS, SCORES, "mask_token"),
            (TokenRemoval(), IDS, SCORES[:, :3], "attributions must be"),
            (TokenRemoval(tokens="other"), {"input_ids": IDS}, SCORES, "'other'"),
            (TokenRemoval(), (IDS,), SCORES, "tuple"),
        ],
    )
    def test_bad_input(self, removal: TokenRemoval, inputs: object, scores: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            removal.prepare(inputs, scores)

    def test_lengths_that_no_mask_can_tell_apart_are_refused(self) -> None:
        units = TokenRemoval(attention_mask=None).prepare({"input_ids": self.IDS}, self.SCORES)
        removed = torch.zeros(2, 6, dtype=torch.bool)
        removed[0, 0] = True
        with pytest.raises(ValueError, match="different lengths"):
            units.remove(removed)


class TestAccumulator:
    def test_stream_equals_the_whole_and_can_be_stored_and_merged(self) -> None:
        images, maps = torch.rand(12, 1, 2, 2), torch.rand(12, 2, 2)
        options = {"fractions": QUARTERS, "measure": "logit"}
        whole = perturbation_auc(weighing, images, maps, 1, **options)
        parts = [PerturbationAUC(weighing, **options) for _ in range(2)]
        for start in range(0, 12, 3):
            parts[start // 6].update(images[start : start + 3], maps[start : start + 3], 1)
        restored = PerturbationAUC(weighing, **options)
        restored.load_state_dict(parts[0].state_dict())
        restored.merge(parts[1])
        result = restored.compute(seed=3)
        assert len(restored) == 12
        assert result["auc"].value == pytest.approx(whole.mean().item(), rel=1e-6)
        assert result["auc"].low < result["auc"].value < result["auc"].high
        assert result["auc"].count == 12
        assert result["curve"][0].value == pytest.approx(weighing(images)[:, 1].mean().item(), rel=1e-6)
        assert restored.compute(seed=3) == result

    def test_nothing_seen_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="before any update"):
            PerturbationAUC(weighing).compute()


class TestSaCo:
    def test_by_hand(self) -> None:
        # With "black", removing a group of an all-white image takes its weights from the logit of class 1.
        def forward(images: Tensor) -> Tensor:
            score = (images[:, 0] * WEIGHT).sum((1, 2)) / 10
            return torch.stack([torch.zeros_like(score), score], dim=1)

        options = {"target": 1, "groups": 4, "removal": "black"}
        assert saco(forward, WHITE, WEIGHT[None], **options).item() == pytest.approx(1)
        assert saco(forward, WHITE, -WEIGHT[None], **options).item() == pytest.approx(-1)
        # Salience 4, 3, 1, 2 for influence 4, 3, 2, 1: groups in order of salience have influence 4, 3, 1, 2.
        # Only the pair (third, fourth) is wrong, with weight 2 - 1 = 1; all weights are 1 + 2 + 3 + 1 + 2 + 1 = 10.
        swapped = torch.tensor([[[4.0, 3.0], [1.0, 2.0]]])
        assert saco(forward, WHITE, swapped, **options).item() == pytest.approx(0.8)

    def test_random_is_about_zero_and_constant_exactly(self) -> None:
        generator = torch.Generator().manual_seed(1)
        weight = torch.rand(8, 8, generator=generator)

        def forward(images: Tensor) -> Tensor:
            score = (images[:, 0] * weight).mean((1, 2))
            return torch.stack([torch.zeros_like(score), score], dim=1)

        images = torch.rand(200, 1, 8, 8, generator=generator)
        random = saco(forward, images, torch.rand(200, 8, 8, generator=generator), 1, groups=8, removal="black")
        assert abs(random.mean().item()) < 0.15
        assert saco(forward, images, torch.full((200, 8, 8), 0.1), 1, removal="black").abs().max() == 0
        influence = images[:, 0] * weight
        assert saco(forward, images, influence, 1, groups=8, removal="black").min() > 0.99

    def test_default_target_is_the_prediction_and_the_default_removal_the_mean(self) -> None:
        image = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])

        def forward(images: Tensor) -> Tensor:
            score = images[:, 0, 0, 0]
            return torch.stack([torch.zeros_like(score), 4 * score], dim=1)

        # Replacing the one bright pixel by the mean 0.25 lowers class 1, the predicted one.
        assert saco(forward, image, image[:, 0], groups=4).item() == pytest.approx(1)
        assert saco(forward, image, image[:, 0], [0], groups=4).item() == pytest.approx(-1)

    def test_short_sequences_leave_groups_empty(self) -> None:
        value = torch.arange(20.0)

        def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            score = (value[input_ids] * attention_mask).sum(1) / 20
            return torch.stack([torch.zeros_like(score), score], dim=1)

        ids = torch.tensor([[3, 9, 0], [2, 5, 7]])
        mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        scores = torch.tensor([[3.0, 9.0, 0.0], [7.0, 5.0, 2.0]])
        result = saco(forward, {"input_ids": ids, "attention_mask": mask}, scores, 1, groups=10, removal=TokenRemoval())
        # Second row: salience 7, 5, 2 for influence 2, 5, 7: every pair is wrong.
        assert result.tolist() == [pytest.approx(1), pytest.approx(-1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "up"}, "order"),
        ({"measure": "error"}, "measure"),
        ({"fractions": (0.5, 0.1)}, "rising order"),
        ({"fractions": (0.0, 1.5)}, "fractions"),
        ({"removal": "grey"}, "baseline"),
        ({"attributions": torch.full((1, 2, 2), float("nan"))}, "example 0 hold NaN"),
        ({"attributions": torch.rand(2, 2, 2)}, "1 images"),
        ({"target": [0, 1]}, "1 examples"),
        ({"target": torch.tensor([0.5])}, "integers"),
        ({"target": "cat"}, "an int, a list or a tensor of them, got 'cat'"),
        ({"target": 2}, "target=2: the model has 2 classes, 0 to 1"),
        ({"target": -1, "measure": "logit"}, "target=-1: the model has 2 classes"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {"inputs": WHITE, "attributions": WEIGHT[None], "target": 1, **change}
    with pytest.raises(ValueError, match=message):
        perturbation_curve(weighing, **arguments)


def test_forward_without_class_scores_is_named() -> None:
    with pytest.raises(ValueError, match="forward must return scores"):
        perturbation_curve(lambda images: images, WHITE, WEIGHT[None], 1)
