"""The explain and coverage commands: what they write, and that a failure is one line and leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from captum.attr import InputXGradient
from PIL import Image
from safetensors.torch import save_file

from captum_transformer_attr.cli.app import run
from captum_transformer_attr.visualization import example_figures

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, a described ViT and a BERT folder."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    vit = timm.models.VisionTransformer(**VIT)
    metadata = {
        "model": "timm.models.VisionTransformer",
        "kwargs": json.dumps(VIT),
        "classes": '["cat, domestic cat", "dog", "bird"]',
        "mean": "[0.5, 0.5, 0.5]",
        "std": "[0.5, 0.5, 0.5]",
    }
    save_file(vit.state_dict(), folder / "vit.safetensors", metadata=metadata)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    bert = folder / "bert"
    bert.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "un", "##watch", "##able"]
    (bert / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(bert / "vocab.txt"), model_max_length=8).save_pretrained(bert)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )
    BertForSequenceClassification(config).save_pretrained(bert)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command runs in an empty folder, where whatever it leaves behind can be seen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def explain(*arguments: Any) -> int:
    return run(["explain", "--device", "cpu", *map(str, arguments)])


def test_image_scores_are_those_of_the_class(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, photo = folder / "vit.safetensors", folder / "photo.png"
    assert explain(photo, "-m", model, "-t", "dog", "-t", 0, "--method", "InputXGradient,Saliency", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    (example,) = result["examples"]
    assert [entry["label"] for entry in example["classes"]] == ["dog", "cat"]
    assert [entry["target"] for entry in example["classes"]] == [1, 0]
    (panel,) = example["panels"]
    assert (panel["kind"], panel["size"]) == ("image", [32, 32])
    vit = timm.models.VisionTransformer(**VIT).eval()
    from safetensors.torch import load_file

    vit.load_state_dict(load_file(model))
    pixels = torch.from_numpy(np.asarray(Image.open(photo))).permute(2, 0, 1)[None].float() / 127.5 - 1
    expected = InputXGradient(vit).attribute(pixels.requires_grad_(), target=1).sum(1)[0]
    scores = torch.tensor(panel["scores"]["dog"]["InputXGradient"])
    torch.testing.assert_close(scores, expected.detach(), atol=1e-6, rtol=1e-4)
    probability = vit(pixels).softmax(-1)[0, 1].item()
    assert example["classes"][0]["probability"] == pytest.approx(probability, abs=1e-6)
    assert list(Path().iterdir()) == []


def test_text_scores_are_per_word(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("a unwatchable film", "-m", folder / "bert", "--method", "TransformerRelevance,InputXGradient")
    pieces = ["a", "unwatchable", "film"]
    results = {}
    for merge in ("max", "sum"):
        assert explain(*arguments, "--merge", merge, "-t", "negative", "--json") == 0
        (example,) = json.loads(capsys.readouterr().out)["examples"]
        assert example["panels"][0]["tokens"]["negative"] == pieces
        results[merge] = example["panels"][0]["scores"]["negative"]
    for method in ("TransformerRelevance", "InputXGradient"):
        assert results["max"][method][0] == results["sum"][method][0]  # one piece
        assert results["max"][method][1] != results["sum"][method][1]  # three pieces
    assert min(results["max"]["TransformerRelevance"]) >= 0


def test_files_are_written_and_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(folder / "photo.png", folder / "photo.png", "-m", folder / "vit.safetensors") == 0
    assert sorted(path.name for path in Path().iterdir()) == ["explanation.html", "explanation.png"]
    captured = capsys.readouterr()
    assert "wrote explanation.png" in captured.err and "photo.png" in captured.out
    page = Path("explanation.html").read_text()
    assert page.count('class="example"') == 2 and "TransformerRelevance" in page
    with Image.open("explanation.png") as picture:
        assert picture.width > 100
    assert explain(folder / "photo.png", "-m", folder / "vit.safetensors", "--html", "only.html") == 0
    assert sorted(path.name for path in Path().iterdir()) == ["explanation.html", "explanation.png", "only.html"]


def test_top_predictions_are_explained_without_a_target(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        explain(folder / "photo.png", "-m", folder / "vit.safetensors", "--top", 3, "--method", "Saliency", "--json")
        == 0
    )
    (example,) = json.loads(capsys.readouterr().out)["examples"]
    probabilities = [entry["probability"] for entry in example["classes"]]
    assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) == pytest.approx(1)


def test_checkpoint_labels_and_preprocessing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2)
    torch.save({"model": model.state_dict()}, "weights.pth")
    Path("labels.txt").write_text("left\nright\n")
    status = explain(
        folder / "photo.png", "-m", "vit_tiny_patch16_224", "--checkpoint", "weights.pth", "--num-classes", 2,
        "--labels", "labels.txt", "--size", "64x96", "--mean", "0,0,0", "--std", "1", "--squash", "-t", "right",
        "--method", "InputXGradient", "--json",
    )  # fmt: skip
    assert status == 0
    (example,) = json.loads(capsys.readouterr().out)["examples"]
    assert example["classes"][0]["label"] == "right"
    assert example["panels"][0]["size"] == [64, 96]


def test_one_class_rather_than_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (folder / "photo.png", "-m", folder / "vit.safetensors", "-t", "dog > cat", "-t", "dog", "-t", "cat")
    assert (
        explain(*arguments, "--method", "InputXGradient,IntegratedGradients:n_steps=4,TransformerRelevance", "--json")
        == 0
    )
    (example,) = json.loads(capsys.readouterr().out)["examples"]
    difference, dog, cat = example["classes"]
    assert difference == {"label": "dog rather than cat", "target": {"first": 1, "second": 0}, "probability": None}
    scores = example["panels"][0]["scores"]
    for name in ("InputXGradient", "IntegratedGradients (n_steps=4)"):  # linear in the output
        parts = {label: np.array(scores[label][name]) for label in scores}
        np.testing.assert_allclose(parts["dog rather than cat"], parts["dog"] - parts["cat"], atol=1e-5)
    assert explain(*arguments[:3], "-t", "dog > cat > bird", "--method", "Saliency", "--html", "a.html") == 1


def test_long_texts_are_cut_where_the_model_ends(folder: Path) -> None:
    text = "good film " * 10
    assert explain(text, "-m", folder / "bert", "--method", "Saliency", "--html", "a.html") == 0
    assert "cut off after 6 words" in Path("a.html").read_text()


def test_texts_are_read_from_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("review.txt").write_text("a good film")
    assert explain("review.txt", "-m", folder / "bert", "--method", "Saliency", "--json") == 0
    assert json.loads(capsys.readouterr().out)["examples"][0]["panels"][0]["tokens"]["negative"] == [
        "a",
        "good",
        "film",
    ]


def test_hostile_text_is_shown_as_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        explain("[red]good[/red] <b>film</b>", "-m", folder / "bert", "--method", "Saliency", "--html", "a.html") == 0
    )
    assert "[red]good[/red]" in capsys.readouterr().out
    assert "<b>film</b>" not in Path("a.html").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.png"], "image 'missing.png' does not exist"),
        ([""], "image '' does not exist"),
        (["PHOTO", "-t", "1 > 1"], "target '1 > 1' is the difference of a class and itself"),
        (["PHOTO", "--size", "9999999"], "more than 4096 pixels a side"),
        (["PHOTO", "--mean", "nan"], "mean must be finite"),
        (["PHOTO", "-m", "  "], "--model is empty"),
        (["PHOTO", "-m", "embedded", "--num-classes", "3"], "the embedded model has 10 classes"),
        (["PHOTO", "--png", "page", "--html", "./page"], "cannot write page: two outputs have this name"),
        (["PHOTO", "--png", "PHOTO"], "it is one of the inputs; choose another name"),
        (["PHOTO", "--png", "/dev/null"], "cannot write /dev/null: it is no regular file"),
        (["PHOTO", "-m", "BERT"], "photo.png is not UTF-8 text; give a sentence or a text file"),
        (["BERT", "-m", "BERT"], "is a folder; give a sentence or a text file"),
        (["missing.txt", "-m", "BERT"], "text file missing.txt does not exist"),
        (["a good film", "-m", "BERT", "--squash"], "go with models that read images"),
        (["PHOTO", "-t", "zebra"], "target 'zebra' is no class"),
        (["PHOTO", "-t", "3"], "target 3 is out of range: the model has 3 classes, 0 to 2"),
        (["PHOTO", "--method", "Magic"], "method 'Magic' is unknown"),
        (["PHOTO", "--method", "Saliency,Saliency"], "given twice"),
        (["PHOTO", "--size", "big"], "--size 'big'"),
        (["PHOTO", "--mean", "1,2"], "--mean '1,2'"),
        (["PHOTO", "--std", "0"], "std must be positive"),
        (["PHOTO", "--device", "gpu"], "device 'gpu'"),
        (["PHOTO", "--labels", "none.txt"], "none.txt"),
        (["PHOTO", "--merge", "median"], "--merge must be one of max, sum, mean"),
        (["PHOTO", "--html", "missing/page.html"], "cannot write missing/page.html"),
        (["PHOTO", "-m", "no-such-model"], "model 'no-such-model'"),
        (["PHOTO", "-m", "./nowhere"], "no such folder"),
        (["PHOTO", "--checkpoint", "none.pth", "-m", "vit_tiny_patch16_224"], "checkpoint none.pth does not exist"),
        (["   ", "-m", "BERT"], "the text holds no words"),
        (["a good film", "-m", "BERT", "-t", "neutral"], "target 'neutral' is no class"),
    ],
)
def test_failures_are_one_line_and_leave_nothing(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"PHOTO": str(folder / "photo.png"), "BERT": str(folder / "bert")}
    arguments = [places.get(argument, argument) for argument in arguments]
    if "-m" not in arguments:
        arguments += ["-m", str(folder / "vit.safetensors")]
    assert explain(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert list(Path().iterdir()) == []


def test_labels_that_do_not_fit_the_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("two.txt").write_text("cat\ndog\n")
    assert explain(folder / "photo.png", "-m", folder / "vit.safetensors", "--labels", "two.txt") == 1
    assert "has 3 classes, but 2 class names; give theirs with --labels" in capsys.readouterr().err


def test_a_failure_while_drawing_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(report: Any, path: Path) -> None:
        path.write_bytes(b"half a page")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("captum_transformer_attr.cli.explain.save_html", fail)
    assert explain(folder / "photo.png", "-m", folder / "vit.safetensors", "--method", "Saliency") == 1
    assert list(Path().iterdir()) == []


def test_outputs_that_exist_survive_a_failure(folder: Path) -> None:
    Path("page.html").write_text("mine")
    assert explain("missing.png", "-m", folder / "vit.safetensors", "--html", "page.html") == 1
    assert Path("page.html").read_text() == "mine"


def test_wrong_calls_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["explain"],
        ["explain", "a.png", "--colour", "red"],
        ["explian"],
        ["explain", "a", "--top", "0"],
        ["explain", "a", "--num-classes", "0"],
    ):
        assert run(arguments) == 2
        captured = capsys.readouterr()
        assert len(captured.err.strip().splitlines()) == 1 and captured.err.startswith("error: ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--png", ""], "error: --png needs the name of a file\n"),
        (["--html", "."], "error: --html needs the name of a file\n"),
        (["--method", ","], "error: --method ',' names nothing; leave it out for the default\n"),
    ],
)
def test_empty_options_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert explain(folder / "photo.png", "-m", folder / "vit.safetensors", *arguments) == 1
    assert capsys.readouterr().err == message
    assert not list(Path().iterdir())


def test_standard_error_holds_the_error_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [folder / "photo.png", "-m", folder / "vit.safetensors", "--json"]
    assert explain(*given, "--method", "TransformerRelevance:start_layer=99") == 1
    failed = capsys.readouterr()
    assert failed.out == "" and len(failed.err.splitlines()) == 1 and failed.err.startswith("error: start_layer=99")
    assert explain(*given, "--method", "RawAttention") == 0
    assert capsys.readouterr().err == ""


def test_another_number_of_classes_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("a good film", "-m", folder / "bert", "--num-classes", 7, "--json") == 1
    assert capsys.readouterr().err == (
        f"error: weights of {folder / 'bert'} do not fit BertForSequenceClassification with --num-classes 7: "
        "classifier.bias is (2,) instead of (7,)\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named() -> None:
    code = "from captum_transformer_attr.cli.printing import print_json\nprint_json('{}')"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "OSError: --json cannot be written to standard output: No space left on device"
    )


def test_a_text_that_was_cut_off_says_so_everywhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = []
    monkeypatch.setattr("captum_transformer_attr.cli.explain.save_png", lambda report, path: drawn.append(report))
    given = ["a good film " * 5, "-m", folder / "bert", "--method", "RawAttention"]
    note = "cut off after 6 words, the longest the model reads"
    assert explain(*given, "--png", "a.png", "--html", "a.html") == 0
    assert note in capsys.readouterr().out and note in Path("a.html").read_text()
    (figure,) = example_figures(drawn[0].examples[0])
    assert note in " ".join(text.get_text() for text in figure.axes[0].texts)
    assert explain(*given, "--json") == 0
    assert note in json.loads(capsys.readouterr().out)["examples"][0]["note"]


def test_letters_that_the_picture_lacks_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["a \U000e0fff film", "-m", folder / "bert", "--method", "RawAttention", "--png", "a.png"]
    assert explain(*given) == 0
    wrote, missing = capsys.readouterr().err.splitlines()
    assert wrote == "wrote a.png" and missing.startswith("a.png: no installed font has \U000e0fff")
    assert missing.endswith("(--html)")


def test_ctrl_c_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("captum_transformer_attr.cli.explain.load_model", interrupt)
    assert explain("a.png") == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_unforeseen_errors_are_one_line_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("captum_transformer_attr.cli.explain.explain_cases", fail)
    arguments = [str(folder / "photo.png"), "-m", str(folder / "vit.safetensors"), "--method", "Saliency"]
    assert explain(*arguments) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: RuntimeError: first line second line")
    assert run(["--debug", "explain", *arguments]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_coverage_lists_operations_and_needs_no_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bert" / "model.safetensors").rename(folder / "elsewhere")
    try:
        assert run(["coverage", "-m", str(folder / "bert")]) == 0
    finally:
        (folder / "elsewhere").rename(folder / "bert" / "model.safetensors")
    out = capsys.readouterr().out
    assert "residual sum" in out and "2 attention calls, nothing refused" in out
    assert run(["coverage", "-m", "./nowhere"]) == 1
    assert capsys.readouterr().err == "error: model ./nowhere: there is no such folder or file\n"


def test_coverage_of_a_refused_model_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["coverage", "-m", "resnet18", "--size", "32"]) == 1
    assert "refused: " in capsys.readouterr().out


def test_coverage_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["coverage", "-m", str(folder / "bert"), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["covered"] and table["attentions"] == 2 and table["refused"] == []
    assert {"operation", "path", "rules", "count", "refused"} == set(table["rows"][0])
    assert run(["coverage", "-m", "resnet18", "--size", "32", "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["covered"]


def test_program_starts_as_a_module() -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "captum_transformer_attr",
            "explain",
            "missing.png",
            "--method",
            "Saliency",
            "-m",
            "./none",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == "error: model ./none: there is no such folder or file\n"
