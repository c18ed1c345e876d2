"""The demo: its table is right, its page and picture are there, and a failure leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from captum_transformer_attr.cli import demo
from captum_transformer_attr.cli.app import run
from captum_transformer_attr.comparison import Method
from captum_transformer_attr.digit_scenes import make_scenes


def test_localisation_columns_by_hand() -> None:
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, 0, :2] = True  # the digit asked for: 2 pixels
    any_digit = masks.clone()
    any_digit[0, 3] = True  # another digit: 4 pixels
    maps = torch.zeros(1, 4, 4)
    maps[0, 0, 0], maps[0, 3, 3], maps[0, 1, 1] = 3.0, 1.0, 4.0  # background beats both digits
    pointing, mass, right = demo._localisation(maps, masks, any_digit)
    assert (pointing, mass, right) == pytest.approx((0.0, 3 / 8, 3 / 4))
    constant = demo._localisation(torch.ones(1, 4, 4), masks, any_digit)
    assert constant == pytest.approx((2 / 16, 2 / 16, 2 / 6))


def test_every_explained_digit_is_in_its_scene() -> None:
    scenes = make_scenes(50, "test", 0)
    digits = demo._one_digit_each(scenes, 0)
    assert (scenes.labels[torch.arange(50), digits] == 1).all()
    assert torch.equal(digits, demo._one_digit_each(scenes, 0))
    assert len(set(digits.tolist())) > 5


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The demo with one cheap method and few scenes shown, in an empty folder."""
    monkeypatch.setattr(demo, "METHODS", ("InputXGradient",))
    monkeypatch.setattr(demo, "SHOWN", {"embedded": 2, "embedded-swin": 1})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_demo_as_json(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)
    assert list(tables) == ["ViT, 200 scenes", "Swin, 200 scenes"]
    assert tables["ViT, 200 scenes"].keys() == {"InputXGradient", "chance"}
    assert tables["ViT, 200 scenes"]["chance"].keys() == {"pointing game", "mass in mask", "right digit"}


def test_demo_writes_a_page_a_picture_and_a_scene(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo"]) == 0
    folder = quick / "captum-transformer-attr-demo"
    assert sorted(path.name for path in folder.iterdir()) == ["demo.html", "demo.png", "scene.png"]
    out = capsys.readouterr().out
    assert "InputXGradient" in out and "chance" in out and "200 scenes" in out
    assert (folder / "demo.html").resolve().as_uri() in out.replace("\n", "")
    page = (folder / "demo.html").read_text()
    assert page.count('class="example"') == 3 and page.count("<table>") == 2
    assert run(["explain", str(folder / "scene.png"), "--method", "InputXGradient", "--html", "scene.html"]) == 0
    with Image.open(folder / "scene.png") as scene:
        assert scene.size == (64, 64)


def test_perfect_and_inverted_methods_end_up_where_they_should(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = make_scenes(40, "test", 3)
    by_image: dict[Any, Any] = {}

    def perfect(model: Any, inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        masks = torch.stack([by_image[image.numpy().tobytes()] for image in inputs])
        return masks[torch.arange(len(inputs)), target].float()[:, None].expand_as(inputs)

    def inverted(model: Any, inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return 1 - perfect(model, inputs, target)

    from captum_transformer_attr.digit_scenes import load_vit
    from captum_transformer_attr.loading.timm_models import image_model

    loaded = image_model("embedded", load_vit(), multi_label=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (loaded.preprocessing.mean, loaded.preprocessing.std))
    by_image.update(
        {
            image.numpy().tobytes(): masks
            for image, masks in zip((scenes.images - mean) / std, scenes.masks, strict=True)
        }
    )
    from captum_transformer_attr.cli.progress import progress_bar

    digits = demo._one_digit_each(scenes, 0)
    with progress_bar() as progress:
        methods = [Method("perfect", perfect), Method("inverted", inverted)]
        rows = dict(demo._measure(loaded, scenes, digits, methods, progress, "ViT"))
    assert rows["perfect"] == pytest.approx((1, 1, 1))
    assert rows["inverted"] == pytest.approx((0, 0, 0))
    assert all(0 < value < 0.6 for value in rows["chance"] if value is not None)


def test_a_failing_demo_leaves_nothing(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(demo, "save_png", fail)
    monkeypatch.setattr(demo, "_measure", lambda *arguments: (("chance", (0.1, 0.1, 0.1)),))
    assert run(["demo"]) == 1
    assert list(quick.iterdir()) == []


def test_unwritable_folders_are_named(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").write_text("a file")
    for folder in ("taken", "missing/folder"):
        assert run(["demo", "-o", folder]) == 1
        error = capsys.readouterr().err
        assert folder in error and len(error.strip().splitlines()) == 1
    assert run(["demo", "--scenes", "10"]) == 2


@pytest.mark.parametrize("output, reason", [("file", "it is a file"), ("missing/folder", "No such file or directory")])
def test_an_output_that_cannot_be_a_folder_is_named(
    quick: Path, output: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (quick / "file").write_text("mine")
    assert run(["demo", "--output", output]) == 1
    assert capsys.readouterr().err == f"error: --output {output} cannot be made a folder: {reason}\n"
    assert (quick / "file").read_text() == "mine"
