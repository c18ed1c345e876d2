"""The small CLIP of coloured shapes: drawings, training, and that the committed one looks at what a text names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from benchmarks.trained_models import shape_pairs, train_clip  # noqa: E402
from benchmarks.trained_models.storage import MissingCheckpointError  # noqa: E402
from captum_transformer_attr import AttentionRelevance  # noqa: E402
from captum_transformer_attr.pairs import explain_pairs  # noqa: E402


def test_masks_are_the_drawn_pixels() -> None:
    things = (("red", "disc"), ("blue", "square"), ("green", "triangle"))
    drawing = shape_pairs.draw(things, np.random.default_rng(0))
    image = np.asarray(drawing.image)
    for (colour, _), mask in zip(things, drawing.masks, strict=True):
        assert mask.any() and (mask == (image == shape_pairs.COLOURS[colour]).all(-1)).all()
    assert (~drawing.masks.any(0) == (image == shape_pairs.BACKGROUND).all(-1)).all()
    assert shape_pairs.caption(things[:2]) == "a red disc and a blue square"


def test_texts_end_where_the_model_reads_them() -> None:
    tokenizer = shape_pairs.tokenizer_of_captions()
    ids = tokenizer(["a red disc", "a red disc and a blue square"], padding=True)["input_ids"]
    end = shape_pairs.build_model(tokenizer).config.text_config.eos_token_id
    assert [row.index(end) for row in ids] == [4, 8] and tokenizer.unk_token_id not in ids[1]


def test_training_writes_what_the_loader_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTA_CACHE", str(tmp_path))
    monkeypatch.setattr("benchmarks.trained_models.storage.COMMITTED_DIR", tmp_path / "none")
    with pytest.raises(MissingCheckpointError, match="train_clip"):
        shape_pairs.load_shape_clip()
    train_clip.main(steps=2, batch_size=4, seed=1)
    clip = shape_pairs.load_shape_clip()
    drawings = [shape_pairs.draw([thing], np.random.default_rng(0)) for thing in shape_pairs.THINGS[:3]]
    assert clip.model(**clip.inputs(drawings, ["a red disc"])).logits_per_image.shape == (3, 1)


def test_the_committed_model_and_what_it_looks_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTA_CACHE", str(tmp_path))
    clip = shape_pairs.load_shape_clip()
    rng = np.random.default_rng(5)
    assert train_clip.accuracy(clip, 100, rng) > 0.95
    # Of two things that share neither colour nor shape, the map of a text lies on the one it names.
    things = [(("red", "disc"), ("blue", "square")), (("yellow", "triangle"), ("green", "disc"))] * 3
    drawings = [shape_pairs.draw(pair, rng) for pair in things]
    hits = 0
    for which in (0, 1):
        texts = [shape_pairs.caption(pair[which : which + 1]) for pair in things]
        maps = explain_pairs(AttentionRelevance(clip.model), clip.inputs(drawings, texts)).image
        for i, drawing in enumerate(drawings):
            pixels = np.kron(maps[i, i].numpy(), np.ones((shape_pairs.PATCH_SIZE,) * 2))
            named, other = (pixels[drawing.masks[k]].mean() for k in (which, 1 - which))
            hits += named > other
    assert hits >= 11
