"""Segmentation scores, pointing game, mass in the mask and class-discriminativeness."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from captum_transformer_attr.metrics import (
    PointingGame,
    SegmentationScores,
    box_masks,
    center_map,
    class_discriminativeness,
    mass_in_mask,
    pointing_game,
    segmentation_scores,
)

MASK = torch.tensor([[[1, 1], [0, 0]]])


def scenes(count: int = 60) -> tuple[Tensor, Tensor]:
    """Masks of boxes at random places and noise."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 12, (count, 2), generator=generator)
    sides = torch.randint(4, 9, (count, 2), generator=generator)
    masks = box_masks(torch.cat([corners, corners + sides], dim=1), (20, 20))
    return masks, torch.rand(count, 20, 20, generator=generator)


class TestPointing:
    def test_by_hand(self) -> None:
        maps = torch.tensor([[[0.1, 0.9], [0.2, 0.3]], [[0.1, 0.2], [0.2, 0.3]]])
        result = pointing_game(maps, MASK.expand(2, 2, 2))
        assert result.hit.tolist() == [1, 0]
        assert result.chance.tolist() == [0.5, 0.5]
        # Four pixels share the middle of a 2 x 2 image, two of them in the mask.
        assert result.center.tolist() == [0.5, 0.5]

    def test_equal_maxima_count_by_their_share(self) -> None:
        maps = torch.tensor([[[0.9, 0.1], [0.9, 0.9]]])
        assert pointing_game(maps, MASK).hit.item() == pytest.approx(1 / 3)
        constant = pointing_game(torch.zeros(1, 2, 2), torch.tensor([[[1, 0], [0, 0]]]))
        assert constant.hit.item() == constant.chance.item() == 0.25

    def test_center_of_an_odd_image_is_one_pixel(self) -> None:
        mask = torch.zeros(1, 3, 5, dtype=torch.bool)
        mask[0, 1, 2] = True
        assert pointing_game(torch.rand(1, 3, 5), mask).center.item() == 1
        assert center_map((3, 5)).argmax().item() == 7

    def test_perfect_random_and_inverted(self) -> None:
        masks, noise = scenes()
        assert pointing_game(masks + 0.1 * noise, masks).hit.mean() == 1
        assert pointing_game(0.1 * noise - masks.float(), masks).hit.mean() == 0
        random = pointing_game(noise.repeat(20, 1, 1).roll(7, 0), masks.repeat(20, 1, 1))
        assert abs(random.hit.mean() - random.chance.mean()) < 0.1

    def test_mass_by_hand(self) -> None:
        maps = torch.tensor([[[3.0, -5.0], [1.0, 0.0]], [[-1.0, -1.0], [-1.0, 0.0]]])
        # 3 of 4 positive; nothing positive says nothing and gets the area.
        assert mass_in_mask(maps, MASK.expand(2, 2, 2)).tolist() == [0.75, 0.5]

    def test_mass_of_perfect_constant_and_inverted(self) -> None:
        masks, _ = scenes()
        assert (mass_in_mask(masks.float(), masks) == 1).all()
        assert (mass_in_mask((~masks).float(), masks) == 0).all()
        assert torch.allclose(mass_in_mask(torch.ones(60, 20, 20), masks), masks.double().mean((1, 2)))

    def test_accumulator_reports_the_subset_off_the_center_and_counts_what_it_skips(self) -> None:
        scores = PointingGame()
        middle = torch.zeros(3, 3, dtype=torch.bool)
        middle[1, 1] = True
        corner = torch.zeros(3, 3, dtype=torch.bool)
        corner[0, 0] = True
        scores.update(center_map((3, 3)).expand(2, 3, 3), torch.stack([middle, corner]))
        scores.update(corner[None].float(), torch.zeros(1, 3, 3))
        result = scores.compute()
        assert (result["hit"].value, result["hit"].count, result["hit"].skipped) == (0.5, 2, 1)
        assert (result["hit_off_center"].value, result["hit_off_center"].count) == (0, 1)
        assert result["center"].value == 0.5
        assert result["chance"].value == pytest.approx(1 / 9)

    def test_boxes_by_hand(self) -> None:
        masks = box_masks([[1, 0, 3, 2], [0, 0, 4, 3]], (3, 4))
        assert masks[0].int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
        assert masks[1].all()
        with pytest.raises(ValueError, match="boxes"):
            box_masks([[1, 2, 3]], (3, 4))
        with pytest.raises(ValueError, match="x0 <= x1"):
            box_masks([[3, 2, 1, 4]], (3, 4))


class TestSegmentation:
    def test_by_hand(self) -> None:
        # Mean 0.5: the two pixels above it are 0.9 (object) and 0.7 (background).
        maps = torch.tensor([[[0.9, 0.4], [0.7, 0.0]]])
        result = segmentation_scores(maps, MASK)
        assert result.pixel_accuracy == pytest.approx(0.5)
        # Object: 1 of 3, background: 1 of 3.
        assert result.mean_iou == pytest.approx(1 / 3)
        unit = maps[0].flatten() / 0.9
        wanted = average_precision_score([1, 1, 0, 0, 0, 0, 1, 1], torch.cat([unit, 1 - unit]))
        assert result.average_precision == pytest.approx(wanted, abs=1e-6)

    def test_accuracy_and_iou_are_sums_over_the_data_set(self) -> None:
        maps = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
        masks = torch.tensor([[[1, 1], [0, 0]], [[1, 1], [1, 0]]])
        result = segmentation_scores(maps, masks)
        assert result.pixel_accuracy == pytest.approx(6 / 8)
        # Object: 3 of 5, background: 3 of 5; a mean over images would be (1 + 1/3) / 2 for the object.
        assert result.mean_iou == pytest.approx(0.6)

    def test_agrees_with_torchmetrics(self) -> None:
        from torchmetrics.classification import BinaryAccuracy, MulticlassJaccardIndex

        masks, noise = scenes()
        maps = masks + 1.5 * noise
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        unit = (maps - low) / (high - low)
        predicted = unit > unit.mean((1, 2), keepdim=True)
        result = segmentation_scores(maps, masks)
        assert result.pixel_accuracy == pytest.approx(BinaryAccuracy()(predicted, masks).item())
        assert result.mean_iou == pytest.approx(MulticlassJaccardIndex(2)(predicted.long(), masks.long()).item())

    def test_perfect_random_and_inverted(self) -> None:
        masks, noise = scenes()
        assert segmentation_scores(masks.float(), masks) == (1, 1, 1)
        inverted = segmentation_scores(-masks.float(), masks)
        assert inverted.pixel_accuracy == inverted.mean_iou == 0
        random = segmentation_scores(noise, masks)
        assert random.pixel_accuracy == pytest.approx(0.5, abs=0.02)
        assert random.average_precision == pytest.approx(0.5, abs=0.02)
        assert inverted.average_precision < random.average_precision

    def test_thresholds(self) -> None:
        maps = torch.tensor([[[1.0, 0.3], [0.3, 0.0]]])
        mask = torch.tensor([[[1, 0], [0, 0]]])
        assert segmentation_scores(maps, mask, threshold=0.9).pixel_accuracy == 1
        assert segmentation_scores(maps, mask, threshold=0.1).pixel_accuracy == 0.5
        assert segmentation_scores(maps, mask).pixel_accuracy == 1  # mean 0.4
        two_levels = torch.cat([torch.full((1, 4, 4), 0.2), torch.full((1, 2, 4), 0.9)], dim=1)
        two_levels[0, 0, 0] = 0
        otsu = segmentation_scores(two_levels, two_levels > 0.5, threshold="otsu")
        assert otsu.pixel_accuracy == 1
        with pytest.raises(ValueError, match="threshold"):
            segmentation_scores(maps, mask, threshold="median")

    def test_pixels_marked_invalid_do_not_count(self) -> None:
        maps = torch.tensor([[[0.9, 0.4], [0.7, 0.0]]])
        valid = torch.tensor([[[1, 0], [0, 1]]])
        assert segmentation_scores(maps, MASK, valid=valid) == (1, 1, 1)

    def test_constant_map_is_background(self) -> None:
        result = segmentation_scores(torch.full((1, 2, 2), 0.3), MASK)
        assert result.pixel_accuracy == 0.5
        assert result.mean_iou == pytest.approx(0.25)

    def test_stream_equals_the_whole_with_an_interval(self) -> None:
        masks, noise = scenes()
        maps = masks + 1.5 * noise
        whole = segmentation_scores(maps, masks)
        stream = SegmentationScores()
        for start in range(0, 60, 7):
            stream.update(maps[start : start + 7], masks[start : start + 7])
        result = stream.compute(resamples=200)
        for name, value in whole._asdict().items():
            assert result[name].value == pytest.approx(value, rel=1e-6)
            assert result[name].low < value < result[name].high

    def test_patch_grid_is_interpolated_to_the_mask(self) -> None:
        grid = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
        mask = torch.zeros(1, 32, 32, dtype=torch.bool)
        mask[:, :16, :16] = True
        assert segmentation_scores(grid, mask, threshold=0.5).pixel_accuracy > 0.9

    @pytest.mark.parametrize(
        ("maps", "masks", "message"),
        [
            (torch.rand(2, 4, 4), torch.ones(1, 4, 4), "N = 2"),
            (torch.rand(1, 4, 4), torch.full((1, 4, 4), 255), "0 and 1"),
            (torch.rand(4, 4), torch.ones(4, 4, 4), "attributions of images"),
            (torch.full((1, 4, 4), float("nan")), torch.ones(1, 4, 4), "NaN"),
            (np.ones((1, 4, 4)), torch.ones(1, 4, 4), "attributions must be a Tensor, got ndarray"),
            (torch.ones(1, 4, 4), np.ones((1, 4, 4)), "masks must be a Tensor, got ndarray"),
        ],
    )
    def test_bad_input(self, maps: Tensor, masks: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            segmentation_scores(maps, masks)


class TestDiscriminativeness:
    MASKS = torch.tensor([[[[1, 0], [0, 0]], [[0, 0], [0, 1]]]])

    def test_by_hand(self) -> None:
        maps = torch.tensor([[[[3.0, 0.0], [0.0, 1.0]], [[1.0, 7.0], [0.0, 1.0]]]])
        result = class_discriminativeness(maps, self.MASKS)
        # 3 of 4 for the first class; 1 of 2 for the second, whose 7 lies on neither object.
        assert result.localization.tolist() == [pytest.approx((0.75 + 0.5) / 2)]
        wanted = 1 - np.corrcoef(maps[0].flatten(1).numpy())[0, 1]
        assert result.separation.tolist() == [pytest.approx(wanted)]

    def test_perfect_class_blind_random_and_inverted(self) -> None:
        masks, noise = scenes()
        objects = torch.stack([masks[:30], masks[30:] & ~masks[:30]], dim=1)
        objects = objects[objects.any(-1).any(-1).all(-1)]
        perfect = class_discriminativeness(objects.float(), objects)
        assert (perfect.localization == 1).all()
        assert (perfect.separation > 1).all()
        blind = class_discriminativeness(noise[: len(objects), None].expand(-1, 2, -1, -1), objects)
        assert torch.allclose(blind.separation, torch.zeros(1).double(), atol=1e-9)
        assert torch.allclose(blind.localization, torch.full((1,), 0.5).double())
        random = class_discriminativeness(torch.rand(len(objects), 2, 20, 20), objects)
        assert random.separation.mean().item() == pytest.approx(1, abs=0.05)
        assert random.localization.mean().item() == pytest.approx(0.5, abs=0.05)
        inverted = class_discriminativeness(objects.flip(1).float(), objects)
        assert (inverted.localization == 0).all()

    def test_maps_that_say_nothing(self) -> None:
        constant = torch.zeros(1, 2, 2, 2)
        result = class_discriminativeness(constant, self.MASKS)
        assert result.separation.item() == 0
        assert result.localization.item() == 0.5
        half = torch.cat([constant[:, :1], torch.rand(1, 1, 2, 2)], dim=1)
        assert class_discriminativeness(half).separation.item() == 1
        empty = class_discriminativeness(torch.rand(1, 2, 2, 2), torch.zeros(1, 2, 2, 2))
        assert empty.localization.isnan().all()

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="two classes"):
            class_discriminativeness(torch.rand(1, 1, 4, 4))
        with pytest.raises(ValueError, match="masks must be"):
            class_discriminativeness(torch.rand(1, 2, 2, 2), self.MASKS[:, :1])
