"""The digit scenes' ground truth is exact, and the shipped models are what their card says."""

from __future__ import annotations

import sys
from dataclasses import fields

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="digit scenes need scikit-learn")
pytest.importorskip("timm", reason="the embedded models are timm models")

from captum_transformer_attr.digit_scenes import (  # noqa: E402
    CLASS_NAMES,
    checkpoint_path,
    load_digit_images,
    load_swin,
    load_vit,
    make_scenes,
    model_info,
)
from captum_transformer_attr.digit_scenes import digits as digits_module  # noqa: E402
from captum_transformer_attr.digit_scenes.drawing import paste, rotated_tiles, segments  # noqa: E402

LOADERS = {"vit": load_vit, "swin": load_swin}


@pytest.fixture(scope="module")
def scenes():
    return make_scenes(64, "test", seed=3)


@pytest.fixture(scope="module")
def held_out():
    return make_scenes(200, "test", seed=1)


def test_same_arguments_give_the_same_scenes_and_another_seed_others(scenes):
    again, other = make_scenes(64, "test", seed=3), make_scenes(64, "test", seed=4)
    for field in fields(scenes):
        assert torch.equal(getattr(scenes, field.name), getattr(again, field.name)), field.name
    assert not torch.equal(scenes.images, other.images)


def test_shapes_types_and_ranges(scenes):
    assert scenes.images.shape == scenes.backgrounds.shape == (64, 3, 64, 64)
    assert scenes.images.dtype == scenes.backgrounds.dtype == torch.float32
    assert scenes.masks.shape == (64, 10, 64, 64) and scenes.masks.dtype == torch.bool
    assert scenes.boxes.shape == (64, 10, 4) and scenes.digit_ids.shape == (64, 10)
    assert len(scenes) == 64
    for canvas in (scenes.images, scenes.backgrounds):
        assert canvas.min() >= 0 and canvas.max() <= 1
    numbers = scenes.labels.sum(1)
    assert set(numbers.tolist()) == {2.0, 3.0, 4.0}


def test_masks_are_exactly_the_pixels_that_the_digits_changed(scenes):
    assert torch.equal((scenes.images != scenes.backgrounds).any(1), scenes.masks.any(1))
    assert scenes.masks.sum(1).max() == 1, "digits overlap"


def test_labels_boxes_and_ids_agree_with_the_masks(scenes):
    assert torch.equal(scenes.labels > 0, scenes.masks.flatten(2).any(-1))
    _, classes = load_digit_images("test")
    for scene, digit in np.ndindex(64, 10):
        ys, xs = scenes.masks[scene, digit].nonzero(as_tuple=True)
        if len(xs):
            expected = [xs.min().item(), ys.min().item(), xs.max().item() + 1, ys.max().item() + 1]
            assert scenes.boxes[scene, digit].tolist() == expected
            assert classes[scenes.digit_ids[scene, digit]] == digit
            # Upscaled handwriting is 16 to 21 pixels high; narrow digits at least as wide as a pen stroke.
            assert 10 <= expected[3] - expected[1] <= 26 and 3 <= expected[2] - expected[0] <= 26
        else:
            assert scenes.boxes[scene, digit].tolist() == [-1] * 4 and scenes.digit_ids[scene, digit] == -1


def test_masks_have_the_shape_of_the_handwriting_they_name(scenes):
    """The mask's box, shrunk to 8 x 8, is brighter under the named digit's ink than beside it."""
    images, _ = load_digit_images("test")
    contrasts = []
    for scene, digit in scenes.labels.nonzero().tolist():
        left, top, right, bottom = scenes.boxes[scene, digit].tolist()
        crop = scenes.masks[scene, digit, top:bottom, left:right].float()
        ink = images[scenes.digit_ids[scene, digit]]
        columns = (ink > 0.2).any(0).nonzero()
        ink = ink[:, columns.min() : columns.max() + 1]
        small = torch.nn.functional.adaptive_avg_pool2d(crop[None, None], tuple(ink.shape))[0, 0]
        contrasts.append(np.corrcoef(small.flatten(), ink.flatten())[0, 1])
    assert np.mean(contrasts) > 0.7 and np.quantile(contrasts, 0.05) > 0.4


def test_a_digit_can_be_taken_out_without_a_trace(scenes):
    for digit in range(10):
        without = scenes.without(digit)
        changed = (without != scenes.images).any(1)
        assert torch.equal(changed, scenes.masks[:, digit])
    assert torch.equal(scenes.images, make_scenes(64, "test", seed=3).images), "the scenes were changed in place"


def test_train_and_test_handwriting_is_disjoint_and_complete():
    train, test = load_digit_images("train"), load_digit_images("test")
    as_set = [{image.numpy().tobytes() for image in part[0]} for part in (train, test)]
    assert not as_set[0] & as_set[1]
    assert len(train[0]) + len(test[0]) == 1797
    # A writer's block starts with 0..9 twice: the cut is where one writer ends and the next begins.
    assert test[1][:20].tolist() == list(range(10)) * 2
    assert all(torch.bincount(part[1], minlength=10).min() >= 30 for part in (train, test))
    assert not torch.equal(make_scenes(2, "train").images, make_scenes(2, "test").images)


def test_the_returned_digits_are_copies():
    load_digit_images("train")[0].zero_()
    assert load_digit_images("train")[0].max() == 1


def test_fewer_digits_on_a_smaller_canvas():
    small = make_scenes(40, "train", canvas_size=32, digits_per_scene=(0, 1))
    assert small.images.shape == (40, 3, 32, 32)
    assert set(small.labels.sum(1).tolist()) == {0.0, 1.0}
    empty = small.labels.sum(1) == 0
    assert torch.equal(small.images[empty], small.backgrounds[empty])
    assert torch.equal(make_scenes(3, "train", digits_per_scene=(0, 0)).labels, torch.zeros(3, 10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(count=0), "count must be at least 1, got 0"),
        (dict(count=2, split="validation"), "split must be 'train' or 'test', got 'validation'"),
        (dict(count=2, canvas_size=8), "canvas_size must be at least 24"),
        (dict(count=2, digits_per_scene=(3, 2)), r"digits_per_scene must be .*got \(3, 2\)"),
        (dict(count=2, canvas_size=32, digits_per_scene=(2, 4)), r"digits_per_scene must be .*0\.\.1 on a 32-pixel"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_scenes(**arguments)


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
    digits_module._all_digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'captum-transformer-attr\[cli\]'"):
        make_scenes(1)


def test_an_unrotated_tile_at_native_size_is_the_digit_itself():
    field = load_digit_images("test")[0][:3]
    tiles = rotated_tiles(field, torch.full((3,), 8.0), torch.zeros(3), 12)
    expected = torch.nn.functional.pad(field, (2, 2, 2, 2))
    assert torch.allclose(tiles, expected, atol=1e-6)
    quarter_turn = rotated_tiles(field, torch.full((3,), 8.0), torch.full((3,), 90.0), 12)
    assert torch.allclose(quarter_turn, expected.rot90(1, (1, 2)), atol=1e-5)


def test_paste_puts_the_tile_around_its_centre_and_cuts_at_the_edge():
    tile = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    inside = paste(tile, torch.tensor([[[5, 3]]]), 8)[0, 0]
    assert torch.equal(inside[1:5, 3:7], tile[0, 0]) and inside.sum() == tile.sum()
    corner = paste(tile, torch.tensor([[[0, 8]]]), 8)[0, 0]
    assert torch.equal(corner[6:, :2], tile[0, 0, :2, 2:]) and corner.sum() == tile[0, 0, :2, 2:].sum()


def test_a_segment_covers_the_pixels_near_it():
    drawn = segments(torch.tensor([[2.0, 4.5]]), torch.tensor([[6.0, 4.5]]), torch.tensor([1.0]), 9)[0]
    assert torch.allclose(drawn[4, 2:6], torch.ones(4))
    distance_to_end = 1.5
    assert torch.isclose(drawn[4, 7], torch.tensor(max(0.0, 0.5 + 0.5 - distance_to_end)))
    assert drawn[:3].sum() == 0 and drawn[6:].sum() == 0


@pytest.mark.parametrize("architecture", ["vit", "swin"])
def test_shipped_checkpoint_is_small_and_loads_as_a_plain_timm_model(architecture):
    from timm.data import resolve_model_data_config
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import VisionTransformer

    assert checkpoint_path(architecture).stat().st_size < 2_000_000
    model, info = LOADERS[architecture](), model_info(architecture)
    assert type(model) is {"vit": VisionTransformer, "swin": SwinTransformer}[architecture]
    assert not any(module.training for module in model.modules())
    assert all(value.dtype == torch.float32 for value in model.parameters())
    assert info.class_names == CLASS_NAMES and info.architecture == architecture
    config = resolve_model_data_config(model)
    assert (config["input_size"], config["mean"], config["std"]) == ((3, 64, 64), info.mean, info.std)
    again = LOADERS[architecture]().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("architecture", ["vit", "swin"])
def test_shipped_model_reaches_its_stated_accuracy_on_unseen_writers(architecture, held_out):
    from torchmetrics.functional.classification import multilabel_average_precision

    model, info = LOADERS[architecture](), model_info(architecture)
    with torch.no_grad():
        logits = model(info.normalize(held_out.images))
    right = (logits > 0) == (held_out.labels > 0)
    precision = multilabel_average_precision(logits, held_out.labels.long(), num_labels=10).item()
    assert right.float().mean() > info.metrics["label_accuracy"] - 0.015
    assert right.all(1).float().mean() > info.metrics["exact_match_accuracy"] - 0.08
    assert precision > info.metrics["mean_average_precision"] - 0.02
    assert info.metrics["label_accuracy"] >= 0.95 and info.metrics["mean_average_precision"] > 0.97


@pytest.mark.parametrize("architecture", ["vit", "swin"])
def test_the_models_evidence_for_a_digit_is_the_digit(architecture, held_out):
    """Taking a digit out lowers its own logit below the threshold far more often than another digit's."""
    model, info = LOADERS[architecture](), model_info(architecture)
    own, other = [], []
    with torch.no_grad():
        before = model(info.normalize(held_out.images)) > 0
        for digit in range(10):
            after = model(info.normalize(held_out.without(digit))) > 0
            rows = before[:, digit] & (held_out.labels[:, digit] > 0)
            own.append(after[rows, digit])
            others = before[rows] & (held_out.labels[rows] > 0)
            others[:, digit] = False
            other.append(after[rows][others])
    assert torch.cat(own).float().mean() < 0.1
    assert torch.cat(other).float().mean() > 0.9


def test_swin_shifts_windows_in_two_stages_and_merges_twice():
    from timm.models.swin_transformer import PatchMerging

    model = load_swin()
    shifts = [[block.shift_size for block in stage.blocks] for stage in model.layers]
    shifted_stages = sum(any(max(shift) > 0 for shift in stage) for stage in shifts)
    assert shifted_stages == 2
    masks = [block.attn_mask for stage in model.layers for block in stage.blocks if max(block.shift_size) > 0]
    assert all(mask is not None and (mask < 0).any() for mask in masks)
    assert sum(isinstance(module, PatchMerging) for module in model.modules()) == 2


def test_vit_reads_a_class_token_over_sixteen_by_sixteen_patches():
    model = load_vit()
    assert model.global_pool == "token" and model.num_prefix_tokens == 1
    assert model.patch_embed.grid_size == (16, 16)


@pytest.mark.parametrize("load", [model_info, checkpoint_path])
def test_unknown_architecture(load):
    with pytest.raises(ValueError, match="architecture must be 'vit' or 'swin', got 'bert'"):
        load("bert")
