"""The easy-VQA reader, the exact shape masks, and the small VisualBERT, LXMERT and DETR with their loaders."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from benchmarks.trained_models import easy_vqa, storage, vqa_models  # noqa: E402
from benchmarks.trained_models.digit_detector import (  # noqa: E402
    average_precision,
    detection_labels,
    detector_inputs,
    load_digit_detr,
)
from benchmarks.trained_models.digit_detector import build_model as build_detr  # noqa: E402
from benchmarks.trained_models.train_detr import DetrTraining, cell_classes  # noqa: E402
from benchmarks.trained_models.train_detr import train as train_detr  # noqa: E402
from benchmarks.trained_models.train_vqa import VqaTraining, accuracies, predict, random_patches  # noqa: E402
from benchmarks.trained_models.train_vqa import train as train_vqa  # noqa: E402
from captum_transformer_attr.digit_scenes import DigitScenes, make_scenes  # noqa: E402

ANSWERS = ["red", "blue", "yes", "no"]
RGB = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
needs_easy_vqa = pytest.mark.skipif(
    not easy_vqa.archive_path().is_file(), reason=f"no easy-VQA archive at {easy_vqa.archive_path()} (set CTA_DATA)"
)


@pytest.fixture(scope="module")
def test_split() -> easy_vqa.EasyVqaSplit:
    return easy_vqa.load_easy_vqa("test")


@pytest.fixture
def empty_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and no committed checkpoints."""
    monkeypatch.setenv("CTA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "COMMITTED_DIR", tmp_path / "committed")
    return tmp_path / "cache"


def square_image(colour: tuple[int, int, int], left: int, top: int, size: int = 12) -> Any:
    image = np.full((64, 64, 3), 240, dtype=np.uint8)
    image[top : top + size, left : left + size] = colour
    return image


def small_split() -> easy_vqa.EasyVqaSplit:
    """Eight images with a red or a blue square and three questions about each."""
    images, questions, rows, answers = [], [], [], []
    for row in range(8):
        colour = ANSWERS[row % 2]
        images.append(square_image(RGB[colour], left=6 * row, top=40 - 5 * row))
        for question, answer in [
            ("what color is the shape?", colour),
            ("is there a red shape?", "yes" if colour == "red" else "no"),
            ("is there a blue shape?", "yes" if colour == "blue" else "no"),
        ]:
            questions.append(question)
            rows.append(row)
            answers.append(ANSWERS.index(answer))
    return easy_vqa.EasyVqaSplit(np.stack(images), questions, np.array(rows), np.array(answers), ANSWERS)


# --- easy-VQA -------------------------------------------------------------------------------------------------------


@needs_easy_vqa
def test_reader_gives_the_published_counts_and_first_question(test_split: easy_vqa.EasyVqaSplit) -> None:
    assert test_split.images.shape == (1000, 64, 64, 3)
    assert len(test_split) == 9673 and len(test_split.answers) == 13
    assert test_split.questions[0] == "what is the red shape?"
    assert test_split.answers[test_split.answer_indices[0]] == "triangle"
    yes_no = np.isin(np.array(test_split.answers)[test_split.answer_indices], ["yes", "no"])
    assert yes_no.sum() == 7136


@needs_easy_vqa
def test_masks_agree_with_the_answers_about_colour_and_shape(test_split: easy_vqa.EasyVqaSplit) -> None:
    """The data set itself says which colour and shape each picture has; the mask must bear that out."""
    colour_of, shape_of = {}, {}
    for row, answer in zip(test_split.image_indices, test_split.answer_indices, strict=True):
        name = test_split.answers[answer]
        if name in RGB:
            colour_of[row] = name
        elif name in ("circle", "rectangle", "triangle"):
            shape_of[row] = name
    assert len(colour_of) > 300 and len(shape_of) > 300
    filling = {"rectangle": 1.0, "circle": np.pi / 4, "triangle": 0.5}
    for row, image in enumerate(test_split.images):
        mask = easy_vqa.shape_mask(image)
        assert len(np.unique(image[~mask], axis=0)) == 1
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        if row in colour_of:
            # The commonest colour is the shape's own; the others are the blended edge.
            colours, counts = np.unique(image[mask], axis=0, return_counts=True)
            assert tuple(colours[counts.argmax()]) == RGB[colour_of[row]], (row, colour_of[row])
        if row in shape_of:
            # The region is the ideal shape and a blended edge, less than a pixel wide all round.
            excess = mask.sum() / (height * width) - filling[shape_of[row]]
            most = 0.0 if shape_of[row] == "rectangle" else 3 / min(height, width)
            assert 0 <= excess <= most, (row, shape_of[row])


@pytest.mark.parametrize("box", [(10, 12, 30, 25), (0, 0, 20, 20), (40, 30, 63, 63)])
@pytest.mark.parametrize("kind", ["rectangle", "ellipse"])
def test_shape_mask_is_the_drawn_region(kind: str, box: tuple[int, int, int, int]) -> None:
    drawn = Image.new("1", (64, 64))
    getattr(ImageDraw.Draw(drawn), kind)(box, fill=1)
    region = np.asarray(drawn)
    image = np.where(region[..., None], np.uint8(128), np.array([250, 231, 240], dtype=np.uint8))
    assert np.array_equal(easy_vqa.shape_mask(image), region)
    patches = easy_vqa.shape_patches(image)
    for row in range(8):
        for column in range(8):
            expected = region[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].any()
            assert patches[row, column] == expected


def test_patch_features_are_pixels_and_one_hot_positions() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    features = easy_vqa.patch_features(images)
    assert features.shape == (2, 64, easy_vqa.FEATURE_DIM) and features.dtype == np.float32
    row, column = 5, 2
    feature = features[1, 8 * row + column]
    pixels = images[1, 40:48, 16:24].astype(np.float64) / 127.5 - 1
    np.testing.assert_allclose(feature[:192].reshape(8, 8, 3), pixels, atol=1e-6)
    assert feature[192:200].argmax() == row and feature[200:].argmax() == column and feature[192:].sum() == 2
    np.testing.assert_array_equal(easy_vqa.patch_boxes()[8 * row + column], [0.25, 0.625, 0.375, 0.75])


def test_moved_shapes_keep_every_pixel_of_the_shape() -> None:
    image = square_image(RGB["teal"], left=50, top=3)
    image[3:6, 50:55] = RGB["red"]  # not symmetric: a mirrored copy can be told from a moved one
    moved = easy_vqa.move_shapes(np.stack([image] * 50), np.random.default_rng(0))
    corners, mirrored = set(), set()
    for copy in moved:
        rows, columns = np.nonzero(easy_vqa.shape_mask(copy))
        top, left = rows.min(), columns.min()
        content = copy[top : top + 12, left : left + 12]
        flipped = not np.array_equal(content, image[3:15, 50:62])
        assert np.array_equal(content[:, ::-1] if flipped else content, image[3:15, 50:62])
        assert len(rows) == 144
        corners.add((top, left))
        mirrored.add(flipped)
    assert len(corners) > 40 and mirrored == {True, False}


def test_random_patches_hold_the_shape() -> None:
    rng = np.random.default_rng(0)
    shapes = rng.random((6, 64)) < 0.2
    counts = set()
    for _ in range(30):
        patches = random_patches(shapes, 16, rng)
        counts.add(patches.shape[1])
        for kept, shape in zip(patches, shapes, strict=True):
            assert len(set(kept)) == len(kept)
            assert set(np.flatnonzero(shape)) <= set(kept)
    assert min(counts) >= 16 and max(counts) <= 64 and len(counts) > 10


# --- VisualBERT and LXMERT ------------------------------------------------------------------------------------------


def test_tokenizer_numbers_words_in_alphabetical_order() -> None:
    tokenizer = vqa_models.build_tokenizer(["is it red?", "is blue it?"])
    # [PAD] [UNK] [CLS] [SEP] ? blue is it red
    assert tokenizer("Is it green?")["input_ids"] == [2, 6, 7, 1, 4, 3]
    assert tokenizer(["red", "is it"], padding=True)["attention_mask"] == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_inputs_keep_the_chosen_patches() -> None:
    data = small_split()
    tokenizer = vqa_models.build_tokenizer(data.questions)
    features = easy_vqa.patch_features(data.images[:2])
    patches = np.array([[3, 9], [0, 63]])
    inputs = vqa_models.vqa_inputs("lxmert", tokenizer, features, data.questions[:2], patches)
    np.testing.assert_array_equal(inputs["visual_feats"][1].numpy(), features[1, [0, 63]])
    np.testing.assert_array_equal(inputs["visual_pos"][0, 1].numpy(), [0.125, 0.125, 0.25, 0.25])
    inputs = vqa_models.vqa_inputs("visualbert", tokenizer, features, data.questions[:2], patches)
    np.testing.assert_array_equal(inputs["visual_embeds"][0].numpy(), features[0, [3, 9]])
    assert inputs["visual_attention_mask"].shape == (2, 2)


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="architecture must be one of visualbert, lxmert, not 'vilt'"):
        vqa_models.build_model("vilt", 10, ANSWERS)  # type: ignore[arg-type]


def test_accuracies_by_hand() -> None:
    data = easy_vqa.EasyVqaSplit(
        images=np.zeros((1, 64, 64, 3), dtype=np.uint8),
        questions=["q"] * 5,
        image_indices=np.zeros(5, dtype=np.int64),
        answer_indices=np.array([0, 1, 2, 3, 3]),
        answers=["yes", "no", "circle", "red"],
    )
    result = accuracies(torch.tensor([0, 0, 2, 3, 1]), data)
    assert result == {"all": 0.6, "yes_no": 0.5, "shape": 1.0, "colour": 0.5}


@pytest.mark.parametrize("architecture", vqa_models.ARCHITECTURES)
def test_training_learns_and_the_loader_gives_the_model_back(
    architecture: vqa_models.Architecture, empty_folders: Path
) -> None:
    data = small_split()
    folder = empty_folders / vqa_models.checkpoint_name(architecture)
    first = train_vqa(architecture, data, data, VqaTraining(epochs=1, batch_size=4, fewest_patches=4), folder)
    last = train_vqa(architecture, data, data, VqaTraining(epochs=8, batch_size=4, fewest_patches=4), folder)
    assert last["loss"] < 0.75 * first["loss"]  # type: ignore[operator]
    assert not [path for path in empty_folders.iterdir() if path != folder]

    load = {"visualbert": vqa_models.load_visualbert_vqa, "lxmert": vqa_models.load_lxmert_vqa}[architecture]
    trained = load()
    assert trained.answers == ANSWERS and not trained.model.training
    assert next(trained.model.parameters()).dtype == torch.float32
    assert accuracies(predict(trained.model, architecture, trained.tokenizer, data), data) == last["test_accuracy"]
    inputs = trained.inputs(data.images[:2], data.questions[:2])
    assert vqa_models.vqa_logits(trained.model(**inputs)).shape == (2, len(ANSWERS))


# --- DETR -----------------------------------------------------------------------------------------------------------


def test_detection_labels_are_normalised_boxes() -> None:
    scenes = make_scenes(3, seed=1)
    for scene, label in enumerate(detection_labels(scenes)):
        assert label["class_labels"].tolist() == scenes.labels[scene].nonzero()[:, 0].tolist()
        for digit, box in zip(label["class_labels"].tolist(), label["boxes"].tolist(), strict=True):
            left, top, right, bottom = scenes.boxes[scene, digit].tolist()
            expected = [(left + right) / 128, (top + bottom) / 128, (right - left) / 64, (bottom - top) / 64]
            assert box == pytest.approx(expected)


def test_cell_classes_against_a_loop() -> None:
    scenes = make_scenes(4, seed=2)
    cells = cell_classes(scenes)
    assert cells.shape == (4, 16, 16)
    for scene in range(4):
        for row in range(16):
            for column in range(16):
                x, y = 4 * column + 2, 4 * row + 2
                holders = [
                    digit
                    for digit, (left, top, right, bottom) in enumerate(scenes.boxes[scene].tolist())
                    if left <= x < right and top <= y < bottom
                ]
                assert int(cells[scene, row, column]) in (holders or [10])


def test_average_precision_by_hand() -> None:
    """Two scenes with digit 3; four detections of it, in order of confidence right, wrong, twice the same, right."""
    boxes = torch.full((2, 10, 4), -1)
    boxes[:, 3] = torch.tensor([0, 0, 32, 32])
    labels = torch.zeros(2, 10)
    labels[:, 3] = 1
    empty = torch.zeros(2, 3, 64, 64)
    scenes = DigitScenes(empty, labels, torch.zeros(2, 10, 64, 64).bool(), boxes, empty, torch.zeros(2, 10).long())
    hit, miss = [0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]
    logits = torch.zeros(2, 2, 11)
    logits[0, :, 3] = torch.tensor([9.0, 7.0])
    logits[1, :, 3] = torch.tensor([8.0, 6.0])
    output = SimpleNamespace(logits=logits, pred_boxes=torch.tensor([[hit, hit], [miss, hit]]))

    class Detector:
        def eval(self) -> None: ...

        def __call__(self, pixel_values: torch.Tensor) -> SimpleNamespace:
            return output

    # Precision 1 at the first digit found, 2/4 at the second; each is half of the recall. Nine classes have no digit.
    assert average_precision(Detector(), scenes) == pytest.approx((1 + 2 / 4) / 2 / 10)


def test_detr_training_reduces_the_loss(empty_folders: Path) -> None:
    settings = DetrTraining(
        scenes=16, held_out_scenes=4, batch_size=8, backbone_steps=5, steps=25, learning_rate=1e-3, save_every=20
    )
    report = train_detr(settings, empty_folders / "detr_digit_scenes")
    trained = load_digit_detr()
    assert report["steps_done"] == 25 and not trained.training
    scenes = make_scenes(16, "train", seed=0)  # those it was trained on
    torch.manual_seed(0)
    losses = []
    for model in (build_detr().eval(), trained):
        with torch.no_grad():
            losses.append(float(model(**detector_inputs(scenes.images), labels=detection_labels(scenes)).loss))
    assert losses[1] < 0.75 * losses[0]


# --- Checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "command"),
    [
        (vqa_models.load_visualbert_vqa, "python -m benchmarks.trained_models.train_vqa --arch visualbert"),
        (vqa_models.load_lxmert_vqa, "python -m benchmarks.trained_models.train_vqa --arch lxmert"),
        (load_digit_detr, "python -m benchmarks.trained_models.train_detr"),
    ],
)
def test_loaders_name_the_training_command(load: Any, command: str, empty_folders: Path) -> None:
    with pytest.raises(storage.MissingCheckpointError) as error:
        load()
    assert command in str(error.value) and str(empty_folders) in str(error.value)


def test_missing_archive_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CTA_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="easy_vqa.tar.gz.*CTA_DATA"):
        easy_vqa.load_easy_vqa("train")


def test_interrupted_write_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    class Interrupted:
        def save_pretrained(self, folder: Path) -> None:
            raise KeyboardInterrupt

    folder = tmp_path / "model"
    model = vqa_models.build_model("visualbert", 10, ANSWERS)
    storage.save_checkpoint(folder, model, {"epochs_done": 1})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        storage.save_checkpoint(folder, model, {"epochs_done": 2}, Interrupted())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


@needs_easy_vqa
@pytest.mark.parametrize("architecture", vqa_models.ARCHITECTURES)
def test_committed_vqa_models_answer_the_test_questions(
    architecture: vqa_models.Architecture,
    test_split: easy_vqa.EasyVqaSplit,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("CTA_CACHE", str(tmp_path))
    trained = {"visualbert": vqa_models.load_visualbert_vqa, "lxmert": vqa_models.load_lxmert_vqa}[architecture]()
    assert trained.answers == test_split.answers
    first = easy_vqa.EasyVqaSplit(
        test_split.images,
        test_split.questions[:500],
        test_split.image_indices[:500],
        test_split.answer_indices[:500],
        test_split.answers,
    )
    predictions = predict(trained.model, architecture, trained.tokenizer, first)
    assert min(accuracies(predictions, first).values()) > 0.9


def test_committed_detr_finds_digits_of_unseen_writers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CTA_CACHE", str(tmp_path))
    assert average_precision(load_digit_detr(), make_scenes(40, "test", seed=11)) > 0.9
