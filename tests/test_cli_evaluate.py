"""The evaluate command: a table of known content, files, and one-line failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from captum_transformer_attr.cli.app import run

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 2}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four pictures whose left half is the object, and a model; the working folder lies beside them and is empty."""
    folder = tmp_path / "data"
    folder.mkdir()
    generator = np.random.default_rng(0)
    entries = []
    for number in range(4):
        name = f"{number}.png"
        Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / name)
        entries.append({"file": name, "label": number % 2, "box": [0, 0, 15, 31]})
    classes = [{"wnid": "a", "name": "cat"}, {"wnid": "b", "name": "dog"}]
    (tmp_path / "index.json").write_text(json.dumps({"classes": classes, "images": entries}))
    torch.manual_seed(0)
    metadata = {"model": "timm.models.VisionTransformer", "kwargs": json.dumps(VIT)}
    save_file(timm.models.VisionTransformer(**VIT).state_dict(), tmp_path / "vit.safetensors", metadata=metadata)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def evaluate(*arguments: Any) -> int:
    return run(["evaluate", "--device", "cpu", *map(str, arguments)])


def boxed(data: Path) -> list[Any]:
    return ["boxed-images", data / "data", "--annotations", data / "index.json", "-m", data / "vit.safetensors"]


def test_table_holds_every_method_and_the_chance_level(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(*boxed(data), "--method", "TransformerRelevance,Random,ImageCenter", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    (task,) = result["tasks"]
    assert list(task["methods"]) == ["TransformerRelevance", "Random", "ImageCenter"]
    metrics = task["methods"]["ImageCenter"]["metrics"]
    assert metrics["chance"]["value"] == pytest.approx(0.5)
    # Two of the four central pixels, which share the centre map's maximum, lie in the left half.
    assert metrics["pointing"]["value"] == pytest.approx(0.5)
    assert metrics["pointing"]["examples"] == 4
    assert list(Path().iterdir()) == []


def test_coco_explains_the_predicted_class(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its pictures have regions of several categories and no label."""
    pytest.importorskip("pycocotools")
    size = {"width": 32, "height": 32}
    left_half = [0, 0, 16, 0, 16, 32, 0, 32]
    instances = {
        "images": [{"id": number, "file_name": f"{number}.png", **size} for number in range(4)],
        "annotations": [
            {"id": number, "image_id": number, "category_id": 17, "bbox": [0, 0, 16, 32], "segmentation": [left_half]}
            | {"iscrowd": 0, "area": 512}
            for number in range(4)
        ],
        "categories": [{"id": 17, "name": "cat"}],
    }
    (data / "instances.json").write_text(json.dumps(instances))
    arguments = ["coco", data / "data", "--annotations", data / "instances.json", "-m", data / "vit.safetensors"]
    assert evaluate(*arguments, "--method", "Random", "--json") == 0
    metrics = json.loads(capsys.readouterr().out)["tasks"][0]["methods"]["Random"]["metrics"]
    assert metrics["chance"]["value"] == pytest.approx(0.5)


def test_files_and_terminal(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(*boxed(data), "--method", "Random,InputXGradient", "--count", 2, "-o", "result") == 0
    captured = capsys.readouterr()
    assert "pointing" in captured.out and "InputXGradient" in captured.out
    assert sorted(path.name for path in Path().iterdir()) == ["result.json", "result.md"]
    assert "2 examples" in Path("result.md").read_text()
    assert json.loads(Path("result.json").read_text())["tasks"][0]["methods"]["Random"]["examples"] == 2


def test_finished_work_is_kept_for_the_next_call(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*boxed(data), "--method", "Random", "--resume", "kept", "--json"]
    assert evaluate(*arguments) == 0
    first = json.loads(capsys.readouterr().out)["tasks"][0]["methods"]
    for picture in (data / "data").iterdir():
        picture.write_bytes(b"gone")
    assert evaluate(*arguments) == 0
    assert json.loads(capsys.readouterr().out)["tasks"][0]["methods"] == first


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mnist"], "data set 'mnist' is unknown"),
        (["sst2"], "needs the folder or file"),
        (["coco", "somewhere"], "--annotations"),
        (["sst2", "missing.tsv"], "missing.tsv"),
        (["boxed-images", "DATA", "--annotations", "none.json"], "none.json"),
        (["BOXED", "--metric", "beauty"], "metric 'beauty' is unknown"),
        (["BOXED", "--method", "Magic"], "method 'Magic' is unknown"),
        (["BOXED", "-o", "missing/result"], "cannot write missing/result.md"),
        (["digit-scenes", "-m", "vit_tiny_patch16_224"], "embedded or embedded-swin"),
        (["digit-scenes", "somewhere"], "digit-scenes are drawn, not read"),
        (
            ["digit-scenes", "-m", "embedded-swin", "--count", "2", "--method", "AttCAT"],
            "no method gives a result; AttCAT:",
        ),
        (["sst2", "EMPTY"], "empty.tsv holds no example"),
        (["images", "DAMAGED", "-m", "VIT", "--metric", "pointing"], "pointing: images does not say where"),
        (["images", "DAMAGED", "-m", "VIT", "--annotations", "x.json"], "leave out --annotations"),
        (["BOXED", "--resume", "VIT"], "finished work cannot be kept in"),
        (["images", "DAMAGED", "-m", "VIT"], "none of 1 examples could be read"),
    ],
)
def test_failures_are_one_line_and_leave_nothing(
    data: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "empty.tsv").write_text("sentence\tlabel\n")
    (data / "damaged").mkdir(exist_ok=True)
    (data / "damaged" / "a.png").write_bytes(b"no picture")
    (data / "damaged" / "labels.json").write_text('{"a.png": {"class_index": 0, "name": "cat"}}')
    places = {
        "DATA": data / "data",
        "EMPTY": data / "empty.tsv",
        "DAMAGED": data / "damaged",
        "VIT": data / "vit.safetensors",
    }
    given: list[Any] = []
    for argument in arguments:
        given += boxed(data) if argument == "BOXED" else [places.get(argument, argument)]
    if not any(option in arguments for option in ("--method", "BOXED")):
        given += ["--method", "Random"]
    assert evaluate(*given) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1 and message in captured.err
    assert list(Path().iterdir()) == []
