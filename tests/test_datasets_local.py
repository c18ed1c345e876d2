"""The readers on the real data beside the project, where it is there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.data_folder import data_folder
from captum_transformer_attr.datasets import (
    BoxedImages,
    EasyVqa,
    Eraser,
    LabelledImages,
    Sst2,
    SstRationales,
    TinyImageNetValidation,
)

DATA = data_folder()
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA} (set CTA_DATA)")


def some(reader, count: int = 25) -> list:  # noqa: ANN001
    """Examples spread over the whole reader, all of them readable."""
    return [e for _, e in reader.examples(range(0, len(reader), max(1, len(reader) // count)), on_error="raise")]


def test_imagenet_samples() -> None:
    pytest.importorskip("timm")
    from timm.data import ImageNetInfo

    reader = LabelledImages(DATA / "imagenet_samples")
    assert len(reader) == 500
    wnids = ImageNetInfo().label_names()
    assert all(wnids[e.label] == Path(e.name).stem for e in some(reader))


def test_tiny_imagenet() -> None:
    pytest.importorskip("timm")
    reader = TinyImageNetValidation(DATA / "tiny_imagenet_val" / "val.tar.gz")
    assert len(reader) == 10_000
    for example in some(reader):
        assert example.image.shape == (64, 64, 3)
        assert example.label is not None
        assert 0 < example.mask().sum() <= 64 * 64


def test_swin_images() -> None:
    folder = DATA / "swin_tinyimagenet20"
    reader = BoxedImages(folder / "validation_images.zip", folder / "validation.json")
    assert (len(reader), len(reader.classes)) == (1000, 20)
    assert all(e.image.shape == (64, 64, 3) and e.mask().any() for e in some(reader))


def test_eraser_movies_quotes_every_span() -> None:
    for split, count in (("val", 200), ("test", 199)):
        reader = Eraser(DATA / "eraser_movies", split)
        examples = list(reader)
        assert (len(examples), reader.skipped) == (count, [])
        assert set(Counter(e.label for e in examples)) == {"NEG", "POS"}
        assert all(e.rationale.any() for e in examples)


def test_sst() -> None:
    assert len(Sst2(DATA / "sst2" / "dev.tsv")) == 872
    reader = SstRationales(DATA / "sst_rationales" / "sst_rationales.jsonl")
    examples = list(reader)
    assert (len(examples), reader.skipped) == (263, [])
    assert 0.1 < sum(e.rationale.mean() for e in examples) / 263 < 0.6


def test_easy_vqa() -> None:
    reader = EasyVqa(DATA / "easy_vqa" / "easy_vqa.tar.gz")
    assert (len(reader), len(reader.answers)) == (9673, 13)
    for example in some(reader):
        assert example.answer in reader.answers
        assert 0 < example.mask.mean() < 0.5
