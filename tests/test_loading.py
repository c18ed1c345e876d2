"""Loading: what fits loads exactly; what does not fails in one line that says why."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from benchmarks.data_folder import data_folder
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.loading import (
    ImageModel,
    LoadingError,
    PreprocessingOptions,
    TextModel,
    class_index,
    load_model,
    load_weights,
    merge_pieces,
    read_image,
    read_labels,
    read_weights,
    words_of,
)

DATA = data_folder()
NAMES = ("goldfish, Carassius auratus", "tabby, tabby cat", "tiger cat", "crane", "crane", "7")


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random BERT classifier with its own small vocabulary."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "un", "##watch", "##able", "."]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1},
    )  # fmt: skip
    BertForSequenceClassification(config).half().save_pretrained(folder)
    return folder


def one_line(error: pytest.ExceptionInfo[LoadingError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_images_are_turned_upright_and_made_rgb(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6), dtype=np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    image = read_image(tmp_path / "turned.png")
    assert image.mode == "RGB" and image.size == (4, 6)
    assert np.asarray(image)[:, -1].min() == 255


@pytest.mark.parametrize("content", [b"", b"no image at all", None])
def test_unreadable_images_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LoadingError, match="broken.png") as error:
        read_image(path)
    one_line(error)


def test_images_of_nan_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(LoadingError, match=r"a\.tif holds NaN"):
        read_image(tmp_path / "a.tif")


def test_truncated_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoadingError, match="cannot be read"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"model": w, "epoch": 3}, lambda w: {"state_dict": w}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_found_inside_checkpoints(tmp_path: Path, wrap, prefix) -> None:  # type: ignore[no-untyped-def]
    model = nn.Linear(2, 3)
    weights = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save(wrap(weights), tmp_path / "a.pth")
    other = nn.Linear(2, 3)
    load_weights(other, tmp_path / "a.pth")
    assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)


class Trap:
    """An object whose unpickling would run code."""

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os.mkdir, ("unpickled",)


def test_checkpoints_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Trap()}, "a.pth")
    with pytest.raises(LoadingError, match="a.pth"):
        read_weights("a.pth")
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_damaged_checkpoints_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04nonsense")
    with pytest.raises(LoadingError, match=name) as error:
        read_weights(tmp_path / name)
    one_line(error)
    with pytest.raises(LoadingError, match="does not exist"):
        read_weights(tmp_path / ("missing-" + name))


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "history": [1, 2]}, tmp_path / "a.pth")
    with pytest.raises(LoadingError, match="epoch, history"):
        read_weights(tmp_path / "a.pth")
    torch.save(torch.zeros(3), tmp_path / "b.pth")
    with pytest.raises(LoadingError, match="Tensor instead of a state dict"):
        read_weights(tmp_path / "b.pth")
    torch.save({}, tmp_path / "c.pth")
    with pytest.raises(LoadingError, match="holds no weights: it is empty"):
        read_weights(tmp_path / "c.pth")
    with pytest.raises(LoadingError, match="is a folder; name the file in it"):
        read_weights(tmp_path)


def test_misfitting_checkpoints_name_their_keys(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3, 5), "extra": torch.zeros(1)}, tmp_path / "a.safetensors")
    model = nn.Linear(2, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(LoadingError) as error:
        load_weights(model, tmp_path / "a.safetensors")
    message = one_line(error)
    assert "missing bias" in message and "unknown extra" in message and "weight (3, 5) instead of (3, 2)" in message
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    weights = nn.Linear(2, 3).state_dict()
    weights["bias"][1] = float("nan")
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(LoadingError, match="NaN or infinite weights: bias"):
        load_weights(nn.Linear(2, 3), tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "wanted, index",
    [("0", 0), ("2", 2), ("tabby", 1), ("Tabby Cat", 1), ("carassius", 0), ("tiger", 2), ("7", 5), ("gold", 0)],
)
def test_classes_are_found_by_index_name_synonym_and_part(wanted: str, index: int) -> None:
    assert class_index(wanted, NAMES, len(NAMES)) == index


@pytest.mark.parametrize(
    "wanted, message",
    [
        ("6", "0 to 5"),
        ("-1", "out of range"),
        ("crane", r"indices \[3, 4\]"),
        ("cat", "several"),
        ("goldfisch", "did you mean 'goldfish'"),
        ("zebra", "is no class"),
    ],
)
def test_unclear_classes_are_explained(wanted: str, message: str) -> None:
    with pytest.raises(LoadingError, match=message):
        class_index(wanted, NAMES, len(NAMES))


def test_names_need_labels() -> None:
    with pytest.raises(LoadingError, match="no class names"):
        class_index("cat", None, 10)
    assert class_index("9", None, 10) == 9


def test_labels_from_text_and_json(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("cat\ndog\n\n")
    (tmp_path / "list.json").write_text('["cat", "dog"]')
    (tmp_path / "map.json").write_text('{"1": "dog", "0": "cat"}')
    for name in ("a.txt", "list.json", "map.json"):
        assert read_labels(tmp_path / name) == ("cat", "dog")
    (tmp_path / "gap.json").write_text('{"0": "cat", "2": "dog"}')
    with pytest.raises(LoadingError, match="gap.json.*no name for '1'"):
        read_labels(tmp_path / "gap.json")
    for name, content in (("empty.txt", " \n"), ("empty.json", "[]"), ("number.json", "3")):
        (tmp_path / name).write_text(content)
        with pytest.raises(LoadingError, match=name) as error:
            read_labels(tmp_path / name)
        one_line(error)
    with pytest.raises(LoadingError, match="missing.txt"):
        read_labels(tmp_path / "missing.txt")


def test_pieces_belong_to_the_words_they_overlap() -> None:
    text = "It's  unwatchable."
    #          [CLS]   it      '       s       un      ##watch  ##able    .         [SEP]
    offsets = [(0, 0), (0, 2), (2, 3), (3, 4), (6, 8), (8, 13), (13, 17), (17, 18), (0, 0)]
    words, pieces = words_of(text, offsets)
    assert words == ("It's", "unwatchable.")
    assert pieces == [[1, 2, 3], [4, 5, 6, 7]]


def test_a_leading_space_inside_a_piece_belongs_to_the_next_word() -> None:
    words, pieces = words_of("a cat", [(0, 1), (1, 5)])
    assert (words, pieces) == (("a", "cat"), [[0], [1]])


def test_words_cut_off_by_truncation_are_left_out() -> None:
    assert words_of("a b c", [(0, 1), (2, 3)]) == (("a", "b"), [[0], [1]])


def test_merging_pieces() -> None:
    scores = np.array([9.0, 0.5, -2.0, 1.0])
    pieces = [[1, 2], [3]]
    np.testing.assert_array_equal(merge_pieces(scores, pieces, "max"), [-2.0, 1.0])
    np.testing.assert_array_equal(merge_pieces(scores, pieces, "sum"), [-1.5, 1.0])
    np.testing.assert_array_equal(merge_pieces(scores, pieces, "mean"), [-0.75, 1.0])


@pytest.mark.parametrize("wrong", [{"size": (0, 3)}, {"std": (0.0, 1.0, 1.0)}])
def test_impossible_preprocessing_is_refused(wrong: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(InputError):
        PreprocessingOptions(**wrong)  # type: ignore[arg-type]


def test_timm_models_come_with_their_own_preprocessing_and_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224")
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    loaded = load_model("vit_tiny_patch16_224", tmp_path / "a.safetensors")
    assert isinstance(loaded, ImageModel) and not loaded.model.training
    assert loaded.class_names is not None and loaded.class_names[281] == "tabby, tabby cat"
    assert loaded.preprocessing.mean == loaded.preprocessing.std == (0.5, 0.5, 0.5)
    pixels = loaded.preprocessing(Image.new("RGB", (300, 200), (255, 0, 127)))
    assert pixels.shape == (3, 224, 224)
    np.testing.assert_allclose(pixels[:, 0, 0], [1.0, -1.0, 127 / 127.5 - 1], atol=1e-6)
    np.testing.assert_array_equal(loaded.preprocessing.picture(pixels)[0, 0], [255, 0, 127])
    assert torch.equal(loaded.model.get_parameter("cls_token"), model.get_parameter("cls_token"))


def test_preprocessing_can_be_overridden(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224")
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    options = PreprocessingOptions((96, 128), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), squash=True)
    loaded = load_model("vit_tiny_patch16_224", tmp_path / "a.safetensors", options)
    assert isinstance(loaded, ImageModel)
    image = Image.new("RGB", (300, 200))
    image.paste((255, 255, 255), (0, 0, 10, 200))  # a stripe at the border that a crop would lose
    pixels = loaded.preprocessing(image)
    assert pixels.shape == (3, 96, 128) and pixels[:, :, 0].min() > 0.9 and pixels.max() <= 1
    assert loaded.model(pixels[None]).shape == (1, 1000)


def test_files_that_describe_their_model(tmp_path: Path) -> None:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 2}
    model = timm.models.VisionTransformer(**arguments)
    metadata = {
        "model": "timm.models.VisionTransformer",
        "kwargs": json.dumps(arguments),
        "classes": '["cat", "dog"]',
        "mean": "[0.1, 0.2, 0.3]",
        "std": "[1, 1, 1]",
    }
    save_file(model.state_dict(), tmp_path / "a.safetensors", metadata=metadata)
    loaded = load_model(str(tmp_path / "a.safetensors"))
    assert isinstance(loaded, ImageModel)
    assert loaded.class_names == ("cat", "dog") and loaded.preprocessing.mean == (0.1, 0.2, 0.3)
    assert loaded.preprocessing(Image.new("RGB", (50, 40))).shape == (3, 32, 32)
    save_file(model.state_dict(), tmp_path / "b.safetensors", metadata={"model": "os.system"})
    with pytest.raises(LoadingError, match="does not say which timm class"):
        load_model(str(tmp_path / "b.safetensors"))


def test_hugging_face_folders(tiny_bert: Path) -> None:
    loaded = load_model(str(tiny_bert))
    assert isinstance(loaded, TextModel) and loaded.class_names == ("negative", "positive")
    assert loaded.model.get_parameter("classifier.weight").dtype == torch.float32
    assert not loaded.model.training


def test_hugging_face_folder_without_its_head_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file

    folder = shutil.copytree(tiny_bert, tmp_path / "headless")
    weights = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in weights.items() if "classifier" not in key}, folder / "model.safetensors")
    with pytest.raises(LoadingError, match="2 missing, e.g. classifier.bias"):
        load_model(str(folder))


def test_models_that_explain_cannot_feed_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForTokenClassification"]}')
    with pytest.raises(LoadingError, match="BertForTokenClassification"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "spec, message",
    [
        ("/no/such/folder", "no such folder"),
        ("./missing", "no such folder"),
        ("vit_tinny_patch16_224", "no timm architecture"),
    ],
)
def test_unknown_models_are_named(spec: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LoadingError, match=message) as error:
        load_model(spec)
    assert spec in one_line(error)


def test_embedded_model_takes_no_checkpoint() -> None:
    with pytest.raises(LoadingError, match="brings its own weights"):
        load_model("embedded", "a.safetensors")


def test_real_weights_see_the_dog_in_the_photo() -> None:
    weights, photo = DATA / "vit_tiny_imagenet/model.safetensors", DATA / "two_class_photos/catdog.png"
    if not weights.exists() or not photo.exists():
        pytest.skip(f"no ViT-Tiny weights or photo under {DATA} (set CTA_DATA)")
    loaded = load_model("vit_tiny_patch16_224", weights)
    assert isinstance(loaded, ImageModel) and loaded.class_names is not None
    with torch.no_grad():
        logits = loaded.model(loaded.preprocessing(read_image(photo))[None])
    assert loaded.class_names[int(logits.argmax())] == "bull mastiff"
