"""Explain for models that read region features: the committed LXMERT and VisualBERT on drawn pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from benchmarks.trained_models.easy_vqa import patch_boxes, patch_features, shape_patches
from benchmarks.trained_models.storage import COMMITTED_DIR
from captum_transformer_attr.cli.app import run

LXMERT, VISUALBERT = (COMMITTED_DIR / f"{name}_easy_vqa" for name in ("lxmert", "visualbert"))
QUESTION = "what color is the shape?"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def picture() -> np.ndarray:
    image = Image.new("RGB", (64, 64), (233, 236, 241))
    ImageDraw.Draw(image).rectangle((8, 24, 31, 47), fill="red")
    return np.asarray(image)


def explained(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    capsys.readouterr()
    chosen = ("--method", "AttentionRelevance", "--device", "cpu", "--top", "1", "--json")
    assert run(["explain", *map(str, arguments), *chosen]) == 0, capsys.readouterr()
    (example,) = json.loads(capsys.readouterr().out)["examples"]
    return example


def test_boxes_are_painted_over_the_picture(picture: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    features = patch_features(picture[None])[0]
    np.savez("room.npz", features=features, boxes=patch_boxes() * 64, image=picture)  # boxes in pixels
    example = explained(capsys, "room.npz", "--model", LXMERT, "--text", QUESTION)
    assert [c["label"] for c in example["classes"]] == ["red"]
    question, regions = example["panels"]
    assert question["title"] == "question" and "color" in question["tokens"]["red"]
    assert regions["size"] == [64, 64]
    scores = np.array(regions["scores"]["red"]["AttentionRelevance"])
    blocks = scores.reshape(8, 8, 8, 8)
    assert (blocks == blocks[:, :1, :, :1]).all()  # one score per patch
    inside = shape_patches(picture)
    grid = blocks[:, 0, :, 0]
    assert grid[inside].mean() > 5 * grid[~inside].mean()


def test_features_alone_are_numbered(picture: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("room.npy", patch_features(picture[None])[0])
    example = explained(capsys, "room.npy", "--model", VISUALBERT, "--text", QUESTION)
    regions = example["panels"][1]
    assert regions["tokens"]["red"] == [f"region {i}" for i in range(64)]
    scores = np.array(regions["scores"]["red"]["AttentionRelevance"])
    assert shape_patches(picture).flatten()[scores.argmax()]


@pytest.mark.parametrize(
    "model, change, message",
    [
        (LXMERT, {"boxes": None}, "reads 'boxes' as well"),
        (LXMERT, {"boxes": np.zeros((3, 4))}, "'boxes' must be (64, 4), got (3, 4)"),
        (LXMERT, {"boxes": np.full((64, 4), 20.0)}, "or in pixels with the 'image' they lie in"),
        (VISUALBERT, {"features": np.zeros((64, 7))}, "7 features per region"),
        (VISUALBERT, {"features": None}, "no numbers of shape (regions, features)"),
        (VISUALBERT, {"features": np.full((64, 208), np.nan)}, "holds NaN or infinite values"),
        (VISUALBERT, {"image": np.zeros((4, 4))}, "'image' must be (height, width, 3) uint8"),
    ],
)
def test_files_that_do_not_fit(
    model: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = {"features": np.zeros((64, 208), dtype=np.float32), "boxes": patch_boxes()} | change
    np.savez("room.npz", **{name: value for name, value in entries.items() if value is not None})
    assert message in refused(capsys, "room.npz", "--model", model, "--text", QUESTION)


def test_other_files_and_no_question(picture: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no such file" in refused(capsys, "none.npz", "--model", LXMERT, "--text", QUESTION)
    Image.fromarray(picture).save("room.png")
    assert "it is no NumPy file" in refused(capsys, "room.png", "--model", LXMERT, "--text", QUESTION)
    assert "ask one with --text" in refused(capsys, "room.png", "--model", LXMERT)


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line that says what is wrong; nothing is written."""
    before = sorted(Path().iterdir())
    capsys.readouterr()
    assert run(["explain", "--device", "cpu", *map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.strip().splitlines()) == 1
    assert sorted(Path().iterdir()) == before
    return captured.err
