"""Masks from detectors: Otsu by exhaustive search, padding, confidences, COCO's format."""

import numpy as np
import pytest
import torch
import transformers as T
from golden_models import published
from pycocotools import mask as coco_mask
from small_hf_models import SEQ2SEQ, build, noise

from captum_transformer_attr import AttentionRelevance, InputError
from captum_transformer_attr.detection import (
    coco_results,
    mask_average_precision,
    otsu_mask,
    pixel_box,
    segmentation_masks,
)


@pytest.fixture(scope="module")
def detr():
    want, model = published("detr_generic_attention", T.DetrForObjectDetection, T.DetrConfig, T.ResNetConfig)
    return model, {name: want[name] for name in ("pixel_values", "pixel_mask")}


def otsu_by_search(grey):
    """The split of 8-bit values with the largest variance between its two sides, by trying them all."""
    values = grey.flatten().astype(float)
    best, threshold = -1.0, 0
    for t in range(int(values.min()), int(values.max())):
        low, high = values[values <= t], values[values > t]
        between = len(low) * len(high) * (low.mean() - high.mean()) ** 2
        if between > best:
            best, threshold = between, t
    return grey > threshold


# ---------------------------------------------------------------------- one map
def test_otsu_mask_against_search():
    for seed in range(5):
        relevance = torch.rand(6, 9, generator=torch.Generator().manual_seed(seed)) ** 3 * 7
        grey = ((relevance - relevance.min()) / (relevance.max() - relevance.min()) * 255).double().round().numpy()
        assert np.array_equal(otsu_mask(relevance, (6, 9)), otsu_by_search(grey))


def test_otsu_mask_is_enlarged():
    relevance = torch.zeros(4, 4)
    relevance[1:3, 2:] = 1.0
    mask = otsu_mask(relevance, (16, 16))
    expected = np.zeros((16, 16), dtype=bool)
    expected[4:12, 8:] = True
    expected[[4, 4, 11, 11], [8, 8, 8, 8]] = False  # at a corner three of four neighbours are outside
    assert np.array_equal(mask, expected)


def test_flat_map_gives_nothing():
    assert not otsu_mask(torch.full((3, 4), 0.2), (12, 16)).any()


def test_pixel_box():
    assert pixel_box(torch.tensor([0.5, 0.25, 0.5, 0.5]), (100, 200)) == (50, 0, 150, 50)


# ---------------------------------------------------------------------- detectors
def test_confident_queries(detr):
    model, inputs = detr
    probabilities = model(**inputs).logits.softmax(-1)[..., :-1]
    scores = probabilities.amax(-1)
    # "Above", as published: the query that reaches just this stays out.
    confidence = float(scores.flatten().sort().values[-6])
    found = segmentation_masks(AttentionRelevance(model), inputs, confidence=confidence)
    assert sum(len(objects) for objects in found) == 5
    for i, objects in enumerate(found):
        assert [o.score for o in objects] == sorted((o.score for o in objects), reverse=True)
        for o in objects:
            assert o.score == probabilities[i, o.query, o.label] == scores[i, o.query] > confidence
    assert segmentation_masks(AttentionRelevance(model), inputs, confidence=1.0) == [[], []]


def test_masks_are_those_of_the_query(detr):
    model, inputs = detr
    method = AttentionRelevance(model)
    found = segmentation_masks(method, inputs, confidence=0.0)
    assert [len(objects) for objects in found] == [6, 6]
    for i, objects in enumerate(found):
        for o in objects[:2]:
            one = {name: t[i : i + 1] for name, t in inputs.items()}
            relevance = method.attribute_tokens(one, (o.query, o.label))["pixel_values"][0]
            assert torch.allclose(o.relevance, relevance, rtol=1e-9, atol=1e-12)
            assert np.array_equal(o.mask, otsu_mask(relevance, (96, 128)))
            assert 0 < o.mask.mean() < 1


def test_padding_is_cut_off(detr):
    """An image padded to a larger canvas gives the masks of the image alone."""
    model, inputs = detr
    padded = {
        "pixel_values": torch.nn.functional.pad(inputs["pixel_values"][:1], (0, 64, 0, 32)),
        "pixel_mask": torch.nn.functional.pad(inputs["pixel_mask"][:1], (0, 64, 0, 32)),
    }
    found = segmentation_masks(AttentionRelevance(model), padded, confidence=0.0)[0]
    assert all(o.relevance.shape == (3, 4) and o.mask.shape == (96, 128) for o in found)
    sized = segmentation_masks(AttentionRelevance(model), padded, confidence=0.0, image_sizes=[(48, 64)])[0]
    assert all(o.mask.shape == (48, 64) for o in sized)
    left, _, right, _ = sized[0].box
    assert np.allclose([left * 2, right * 2], [found[0].box[0], found[0].box[2]])


def test_independent_labels():
    """A detector without "no object" (sigmoid outputs): every output is a label."""
    backbone = T.ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", out_features=["stage1"]
    )
    config = T.ConditionalDetrConfig(
        backbone_config=backbone, **SEQ2SEQ, num_queries=5, num_labels=4, auxiliary_loss=False
    )
    model = build(T.ConditionalDetrForObjectDetection, config, "eager")
    inputs = {"pixel_values": noise(1, 3, 16, 16)}
    scores = model(**inputs).logits.sigmoid()[0]
    found = segmentation_masks(AttentionRelevance(model), inputs, confidence=0.0)[0]
    assert sorted(o.query for o in found) == list(range(5))
    assert all(o.score == pytest.approx(float(scores[o.query].max())) for o in found)


def test_coco_results(detr):
    model, inputs = detr
    found = segmentation_masks(AttentionRelevance(model), inputs, confidence=0.0)
    entries = coco_results(found, [17, 18], {label: 10 * label for label in range(5)})
    assert len(entries) == 12
    for entry, o in zip(entries, [o for objects in found for o in objects], strict=True):
        assert entry["category_id"] == 10 * o.label
        assert np.array_equal(coco_mask.decode(entry["segmentation"]), o.mask)
        left, top, right, bottom = o.box
        assert entry["bbox"] == pytest.approx([left, top, right - left, bottom - top])
    assert [entry["image_id"] for entry in entries] == [17] * 6 + [18] * 6


def test_mask_average_precision_by_hand():
    """One object of 10 columns. A mask of its left half has IoU 0.5 and counts at 0.2, …, 0.5: 7 of 16 thresholds."""

    def entry(columns, **more):
        mask = np.zeros((4, 12), dtype=np.uint8, order="F")
        mask[:, :columns] = 1
        code = coco_mask.encode(mask)
        return {
            "segmentation": {"size": [4, 12], "counts": code["counts"].decode()},
            "category_id": 3,
            "image_id": 1,
        } | more

    truth = {
        "images": [{"id": 1, "height": 4, "width": 12}],
        "categories": [{"id": 3}],
        "annotations": [entry(10, id=1, area=40, iscrowd=0, bbox=[0, 0, 10, 4])],
    }
    assert mask_average_precision(truth, [entry(10, score=0.9)]) == pytest.approx(1)
    assert mask_average_precision(truth, [entry(5, score=0.9)]) == pytest.approx(7 / 16)
    assert mask_average_precision(truth, [entry(1, score=0.9)]) == mask_average_precision(truth, []) == 0
    # A surer wrong mask in front of the right one halves the precision.
    assert mask_average_precision(truth, [entry(1, score=0.9), entry(10, score=0.8)]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"threshold_at": "boxes"}, "threshold_at='boxes'"),
        ({"image_sizes": [(3, 4)]}, "1 sizes for 2 images"),
    ],
)
def test_bad_arguments(detr, change, message):
    model, inputs = detr
    with pytest.raises(InputError, match=message):
        segmentation_masks(AttentionRelevance(model), inputs, **change)


def test_bad_inputs(detr):
    model, inputs = detr
    with pytest.raises(InputError, match="needs 'pixel_values'"):
        segmentation_masks(AttentionRelevance(model), {"pixel_mask": inputs["pixel_mask"]})
    with pytest.raises(InputError, match=r"a detector's is \(N, queries, classes\)"):
        segmentation_masks(AttentionRelevance(model, output=lambda o: o.logits[:, 0]), inputs)
    with pytest.raises(InputError, match="1 numbers for 2 images"):
        coco_results([[], []], [1])
