"""The harness: tables by hand, resuming, refusals, reports, and every kind of task on tiny models."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_transformer_attr.comparison import Method, resolve
from captum_transformer_attr.datasets import DatasetError, ImageExample, Reader, Region, TextExample
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.evaluation import (
    ImageTask,
    TextTask,
    as_json,
    as_markdown,
    center_method,
    circumstances,
    digits,
    earlier_rows,
    evaluate,
    images,
    random_method,
    spread,
    texts,
    write,
)
from captum_transformer_attr.evaluation.digits import DigitTask
from captum_transformer_attr.evaluation.images import patch_size, resized_mask
from captum_transformer_attr.evaluation.language import LanguageTask, sampled_prompts
from captum_transformer_attr.evaluation.machine import commit
from captum_transformer_attr.evaluation.measures.places import corner_mass
from captum_transformer_attr.evaluation.run import attribute_roles
from captum_transformer_attr.evaluation.texts import structural_tokens
from captum_transformer_attr.loading import ImageModel, TextModel
from captum_transformer_attr.loading.images import ImagePreprocessing
from captum_transformer_attr.metrics import PixelRemoval, perturbation_auc, saco

SIDE = 8


class Corners(nn.Module):
    """Logits of two classes: the brightness of the upper left and of the lower right quarter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(4.0))

    def forward(self, images: Tensor) -> Tensor:
        half = images.shape[-1] // 2
        quarters = (images[..., :half, :half], images[..., half:, half:])
        return self.gain * torch.stack([quarter.mean((1, 2, 3)) for quarter in quarters], dim=1)


def loaded(model: nn.Module, size: int = SIDE) -> ImageModel:
    """A model that is shown pictures of its own size in [0, 1]."""

    def transform(image: Any) -> Tensor:
        assert image.size == (size, size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    return ImageModel("corners", model, None, False, ImagePreprocessing(transform, (0.0,) * 3, (1.0,) * 3))


class Pictures(Reader[ImageExample]):
    """Noise with the object of the label in its quarter; numbers in `damaged` cannot be read."""

    def __init__(self, count: int, damaged: Sequence[int] = ()) -> None:
        super().__init__()
        self.count, self.damaged = count, damaged

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> ImageExample:
        if index in self.damaged:
            raise DatasetError(f"picture{index}.png is damaged")
        rng = np.random.default_rng(index)
        image = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
        label, wrong = index % 2, index % 5 == 4
        half = SIDE // 2
        bright = (1 - label) if wrong else label
        image[bright * half : bright * half + half, bright * half : bright * half + half] += 120
        box = (0, 0, half, half) if label == 0 else (half, half, SIDE, SIDE)
        return ImageExample(f"picture{index}.png", image, label, (Region(label, box=box),))


def quarter_map(model: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
    """The exact relevance: the pixels of the target's quarter."""
    half, result = inputs.shape[-1] // 2, torch.zeros_like(inputs)
    for row, label in enumerate(target.tolist()):
        block = slice(label * half, label * half + half)
        result[row, :, block, block] = inputs[row, :, block, block]
    return result


PERFECT = Method("Perfect", quarter_map)
INVERTED = Method("Inverted", lambda model, inputs, target: -quarter_map(model, inputs, target))
METRICS = ("perturbation", "perturbation-squares", "saco", "pointing", "segmentation", "discriminativeness")


def task(count: int = 12, metrics: Sequence[str] = METRICS, damaged: Sequence[int] = ()) -> ImageTask:
    return ImageTask(
        "corners", "Two quarters", loaded(Corners()), Pictures(count, damaged), metrics, range(count), square=2
    )


def values(result: Any, method: str) -> dict[str, float]:
    (row,) = (row for row in result.rows if row.method == method)
    return {column.name: column.estimate.value for column in row.columns}


class TestTables:
    def test_numbers_by_hand(self) -> None:
        result = evaluate(task(), [PERFECT, INVERTED, random_method(), center_method()], batch_size=5)
        perfect, inverted = values(result, "Perfect"), values(result, "Inverted")
        # Two of twelve pictures show the other class; the label's map points at the label's quarter all the same.
        assert perfect["accuracy on the whole input"] == pytest.approx(10 / 12)
        assert perfect["pointing"] == 1
        assert perfect["mass in mask"] == 1
        assert perfect["chance"] == 0.25
        assert inverted["pointing"] == 0
        assert perfect["class separation"] > 1
        assert perfect["SaCo"] == pytest.approx(1)
        assert inverted["SaCo"] == pytest.approx(-1)
        assert perfect["AP"] > inverted["AP"]
        # Three of four squares are irrelevant: removed first, they leave the prediction as it is, up to 0.7.
        assert perfect["squares negative, predicted"] > 100 * 0.7 * 10 / 12
        assert perfect["positive, predicted"] < values(result, "Random")["positive, predicted"]
        assert inverted["negative, predicted"] < values(result, "Random")["negative, predicted"]

    def test_same_numbers_as_the_plain_functions(self) -> None:
        one = task(10, ("perturbation", "saco"))
        pictures = [Pictures(10)[i] for i in range(10)]
        inputs = torch.stack([torch.from_numpy(p.image).permute(2, 0, 1) / 255 for p in pictures])
        labels = torch.tensor([p.label for p in pictures])
        predicted = one.model(inputs).argmax(1)
        assert 0 < (labels != predicted).sum() < 10
        (row,) = evaluate(one, [PERFECT], batch_size=3).rows
        found = {column.name: column.estimate.value for column in row.columns}
        for role, target in (("predicted", predicted), ("label", labels)):
            maps = quarter_map(one.model, inputs, target)
            for order in ("positive", "negative"):
                area = perturbation_auc(one.model, inputs, maps, labels, order=order, removal=PixelRemoval("black"))
                assert found[f"{order}, {role}"] == pytest.approx(area.mean().item(), rel=1e-6)
        maps = quarter_map(one.model, inputs, predicted)
        assert found["SaCo"] == pytest.approx(saco(one.model, inputs, maps).mean().item(), rel=1e-6)

    def test_batch_size_does_not_matter(self) -> None:
        methods = [PERFECT, random_method(3)]
        tables = [evaluate(task(7), methods, batch_size=size) for size in (1, 3, 7)]
        for table in tables[1:]:
            for method in methods:
                assert values(table, method.name) == pytest.approx(
                    values(tables[0], method.name), nan_ok=True, rel=1e-6
                )

    def test_damaged_examples_are_left_out_and_named(self) -> None:
        result = evaluate(task(6, ("pointing",), damaged=(1, 4)), [PERFECT, INVERTED], batch_size=2)
        assert result.skipped == ("picture1.png is damaged", "picture4.png is damaged")
        assert [row.examples for row in result.rows] == [4, 4]
        assert "2 examples skipped: picture1.png is damaged; picture4.png" in as_markdown(
            [result], circumstances(), "t"
        )

    def test_a_refusal_becomes_a_row_and_a_defect_is_raised(self) -> None:
        def refuse(model: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
            raise InputError("no attention\nin this model")

        def fail(model: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
            raise RuntimeError("defect")

        result = evaluate(task(4, ("pointing",)), [Method("Refusing", refuse), PERFECT])
        assert result.rows[0].error == "no attention in this model"
        assert result.rows[0].columns == ()
        assert "- Refusing: no attention in this model" in as_markdown([result], circumstances(), "t")
        assert as_json([result], {})["tasks"][0]["methods"]["Refusing"]["error"] == "no attention in this model"
        with pytest.raises(RuntimeError, match="defect"):
            evaluate(task(4, ("pointing",)), [Method("Failing", fail)])

    def test_scores_that_a_measure_refuses_cost_one_row(self) -> None:
        unknown = Method("Unknown", lambda model, inputs, target: inputs * math.nan)
        result = evaluate(task(4, ("pointing",)), [unknown, PERFECT])
        assert result.rows[0].error == "attributions of example 0 hold NaN" and not result.rows[0].columns
        assert values(result, "Perfect")["pointing"] == 1

    def test_a_metric_named_twice_counts_its_examples_once(self) -> None:
        (row,) = evaluate(task(4, ("pointing", "pointing")), [PERFECT]).rows
        names = [column.name for column in row.columns]
        assert len(names) == len(set(names)) and row.columns[0].estimate.count == 4

    def test_metrics_of_places_need_to_know_them(self) -> None:
        reader = Pictures(4)
        reader.has_regions = False
        with pytest.raises(InputError, match="pointing, segmentation: nowhere does not say where"):
            ImageTask("nowhere", "", loaded(Corners()), reader, ("pointing", "saco", "segmentation"), range(4))

    def test_unknown_metric_and_missing_label(self) -> None:
        with pytest.raises(InputError, match="metric 'speed' is unknown here; known: perturbation"):
            task(4, ("speed",))

        class Unlabelled(Pictures):
            def load(self, index: int) -> ImageExample:
                return ImageExample("a.png", super().load(index).image)

        unlabelled = ImageTask("t", "t", loaded(Corners()), Unlabelled(3), ("perturbation",), range(3))
        with pytest.raises(DatasetError, match="a.png has label None"):
            evaluate(unlabelled, [PERFECT])


def test_every_listed_metric_has_measures() -> None:
    assert task(4, images.METRICS).metrics == images.METRICS
    assert TextTask("t", "t", tiny_text_model(), Sentences(2), texts.METRICS, range(2)).metrics == texts.METRICS
    assert DigitTask("vit", 2).metrics == digits.METRICS


def test_corner_mass_by_hand() -> None:
    even, corner, middle, nothing = torch.ones(4, 8, 8)
    corner[2:] = corner[:, 2:] = 0  # 2 x 2 of 8 x 8 pixels
    middle[:2] = middle[6:] = 0
    nothing[:] = -1
    half = even.clone()
    half[:4] = -3  # below zero counts for nothing: two of four corners hold a quarter of what is left
    found = corner_mass(torch.stack([even, corner, middle, nothing, half]))
    torch.testing.assert_close(found, torch.tensor([1.0, 4.0, 0.0, 0.0, 1.0]))


class TestRoles:
    def test_a_class_is_explained_once(self) -> None:
        calls: list[int] = []

        def counting(model: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
            calls.append(len(inputs))
            return quarter_map(model, inputs, target)

        one = task(10, ("perturbation", "discriminativeness"))
        (batch,) = one.batches(10)
        maps = attribute_roles(Method("Counting", counting), one, batch)
        wrong = int((batch.targets["predicted"] != batch.targets["label"]).sum())
        assert calls == [10, wrong, 10]  # predicted, label where it differs, other
        for role in ("predicted", "label", "other"):
            assert torch.equal(maps[role], quarter_map(one.model, batch.inputs, batch.targets[role]))


class TestResuming:
    def test_goes_on_where_it_was_interrupted(self, tmp_path: Path) -> None:
        calls: list[int] = []

        def counting(model: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
            calls.append(len(inputs))
            return quarter_map(model, inputs, target)

        def interrupt(method: str, done: int, total: int) -> None:
            if done == 6:
                raise KeyboardInterrupt

        methods = [Method("Counting", counting)]
        options: dict[str, Any] = {"batch_size": 2, "folder": tmp_path, "save_every": 0.0}
        with pytest.raises(KeyboardInterrupt):
            evaluate(task(12, ("pointing", "saco")), methods, advance=interrupt, **options)
        before = len(calls)
        result = evaluate(task(12, ("pointing", "saco")), methods, **options)
        resumed = len(calls) - before
        calls.clear()
        fresh = values(evaluate(task(12, ("pointing", "saco")), methods, batch_size=2), "Counting")
        assert len(calls) == before + resumed  # every batch was explained once in the two runs together
        assert values(result, "Counting") == pytest.approx(fresh, nan_ok=True, rel=1e-12)
        calls.clear()
        again = evaluate(task(12, ("pointing", "saco")), methods, **options)
        assert calls == []
        assert values(again, "Counting") == pytest.approx(fresh, nan_ok=True, rel=1e-12)

    def test_other_weights_or_examples_are_not_mixed_in(self, tmp_path: Path) -> None:
        evaluate(task(4, ("pointing",)), [INVERTED], folder=tmp_path)
        changed = task(4, ("pointing",))
        nn.init.constant_(changed.model.gain, 5.0)
        method = Method("Inverted", quarter_map)
        assert values(evaluate(changed, [method], folder=tmp_path), "Inverted")["pointing"] == 1
        more = task(6, ("pointing",))
        assert evaluate(more, [method], folder=tmp_path).rows[0].examples == 6

    def test_a_longer_run_goes_on_behind_the_stored_examples(self, tmp_path: Path) -> None:
        explained: list[int] = []

        def counting(model: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
            explained.append(len(inputs))
            return quarter_map(model, inputs, target)

        methods = [Method("Counting", counting)]
        evaluate(task(7, ("pointing",)), methods, batch_size=3, folder=tmp_path)
        assert sum(explained) == 7
        explained.clear()
        longer = evaluate(task(12, ("pointing",)), methods, batch_size=3, folder=tmp_path)
        # The seventh example stood in a batch of its own and is done again with its neighbours.
        assert sum(explained) == 6
        assert longer.rows[0].examples == 12
        fresh = evaluate(task(12, ("pointing",)), methods, batch_size=3)
        assert values(longer, "Counting") == pytest.approx(values(fresh, "Counting"), rel=1e-12, nan_ok=True)

    def test_other_data_of_the_same_kind_are_not_mixed_in(self, tmp_path: Path) -> None:
        def pictures_in(folder: str) -> ImageTask:
            one = task(4, ("pointing",))
            one.reader.source = (folder,)
            return one

        evaluate(pictures_in("/here"), [PERFECT], folder=tmp_path)
        inverted = replace(INVERTED, name="Perfect")
        assert values(evaluate(pictures_in("/here"), [inverted], folder=tmp_path), "Perfect")["pointing"] == 1
        assert values(evaluate(pictures_in("/there"), [inverted], folder=tmp_path), "Perfect")["pointing"] == 0

    def test_examples_that_could_not_be_read_stay_named(self, tmp_path: Path) -> None:
        for _ in range(2):  # the second run reads nothing
            result = evaluate(task(5, ("saco",), damaged=[1]), [PERFECT, INVERTED], folder=tmp_path)
            assert result.skipped == ("picture1.png is damaged",)

    def test_a_folder_that_keeps_nothing_is_refused_before_the_work(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        never = Method("Never", lambda model, inputs, target: pytest.fail("attributed"))
        with pytest.raises(InputError, match="cannot be kept in .*file: "):
            evaluate(task(4, ("saco",)), [never], folder=tmp_path / "file")

    def test_a_damaged_file_is_done_again(self, tmp_path: Path) -> None:
        evaluate(task(4, ("pointing",)), [PERFECT], folder=tmp_path)
        (file,) = tmp_path.rglob("*.npz")
        file.write_bytes(file.read_bytes()[:-40])
        assert values(evaluate(task(4, ("pointing",)), [PERFECT], folder=tmp_path), "Perfect")["pointing"] == 1


def test_precision_is_that_of_the_altered_inputs_alone() -> None:
    seen: list[torch.dtype] = []
    attributing: list[bool] = []
    one = task(4, ("perturbation",))

    def watch(module: nn.Module, arguments: Any, output: Tensor) -> None:
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)

    def watched(model: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
        attributing.append(torch.is_autocast_enabled("cpu"))
        return quarter_map(model, inputs, target)

    one.model.register_forward_hook(watch)
    result = evaluate(one, [Method("Watched", watched)], precision=torch.bfloat16)
    assert attributing == [False] * len(attributing) and attributing
    assert seen.count(torch.float32) == 1  # the clean logits of the one batch
    assert seen.count(torch.bfloat16) == 2 * 9  # two directions; predicted and label are the same in these four
    assert result.description["precision"] == "torch.bfloat16"


class TestControls:
    def test_random_depends_on_the_example_alone(self) -> None:
        images = torch.rand(4, 3, 6, 6)
        model = nn.Identity()
        together = random_method().attribute(model, images, None)
        alone = torch.cat([random_method().attribute(model, images[i : i + 1], None) for i in (0, 1, 2, 3)])
        assert torch.equal(together, alone)
        assert together.shape == images.shape
        assert torch.equal(together[:, 0], together[:, 2])
        assert not torch.equal(together[0], together[1])
        assert not torch.equal(together, random_method(1).attribute(model, images, None))

    def test_another_seed_is_another_row_and_file(self) -> None:
        assert [random_method(seed).name for seed in (0, 1)] == ["Random", "Random (seed=1)"]

    def test_containers(self) -> None:
        ids, features = torch.randint(0, 9, (2, 5)), torch.rand(2, 4, 3)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "visual_embeds": features}
        maps = random_method().attribute(nn.Identity(), inputs, None)
        assert {name: tuple(value.shape) for name, value in maps.items()} == {
            "input_ids": (2, 5),
            "visual_embeds": (2, 4, 3),
        }

    def test_center_needs_an_image(self) -> None:
        image = torch.rand(1, 3, 5, 5)
        assert center_method().attribute(nn.Identity(), image, None)[0, 0].argmax() == 12
        with pytest.raises(InputError, match="ImageCenter needs images"):
            center_method().attribute(nn.Identity(), torch.ones(1, 5, dtype=torch.long), None)


class TestHelpers:
    def test_spread_and_halves(self) -> None:
        assert spread(10, 4) == [0, 2, 5, 7]
        assert spread(3, None) == spread(3, 9) == [0, 1, 2]
        even, odd = spread(100, 10, "even"), spread(100, 10, "odd")
        assert not set(even) & set(odd)
        assert sorted(even + odd) == spread(100, 10)

    def test_masks_follow_the_picture_and_never_vanish(self) -> None:
        mask = np.zeros((4, 4), dtype=bool)
        mask[:2, :2] = True
        assert resized_mask(mask, (8, 8)).int().sum() == 16
        assert resized_mask(mask, (8, 8))[:4, :4].all()
        speck = np.zeros((64, 64), dtype=bool)
        speck[63, 63] = True
        assert resized_mask(speck, (8, 8)).nonzero().tolist() == [[7, 7]]
        assert not resized_mask(np.zeros((64, 64), dtype=bool), (8, 8)).any()

    def test_patch_size_by_convention(self) -> None:
        timm = pytest.importorskip("timm")
        vit = timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=2)
        assert patch_size(vit) == 4
        assert patch_size(nn.Linear(1, 1)) == 16


class Sentences(Reader[TextExample]):
    """Words w0 ... w9; the label is decided by whether w1 is among them, which is the rationale."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> TextExample:
        rng = np.random.default_rng(index)
        words = [f"w{i}" for i in rng.integers(2, 10, size=int(rng.integers(3, 9)))]
        if index % 2:
            words[int(rng.integers(len(words)))] = "w1"
        rationale = np.array([word == "w1" for word in words])
        return TextExample(f"text {index}", tuple(words), ("NEG", "POS")[index % 2], rationale)


def tiny_text_model() -> TextModel:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(10))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=16,
    )  # fmt: skip
    config = transformers.BertConfig(
        vocab_size=15, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, id2label={0: "negative", 1: "positive"},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    return TextModel("tiny", model, ("negative", "positive"), False, tokenizer)


class TestTexts:
    METRICS = ("perturbation", "perturbation-mask", "saco", "rationale")

    def test_rationales_of_a_method_that_knows(self) -> None:
        model = tiny_text_model()

        def find(module: nn.Module, inputs: Any, target: Tensor) -> dict[str, Tensor]:
            return {"input_ids": (inputs["input_ids"] == 6).float()}

        one = TextTask("t", "t", model, Sentences(10), self.METRICS, range(10), k=(1, 2))
        result = evaluate(one, [Method("Knowing", find), random_method()], batch_size=4)
        knowing = values(result, "Knowing")
        assert knowing["AUPRC"] == 1
        assert knowing["F1@1"] == 1
        assert values(result, "Random")["AUPRC"] < 0.9
        (row, _) = result.rows
        (auprc,) = (column.estimate for column in row.columns if column.name == "AUPRC")
        assert (auprc.count, auprc.skipped) == (5, 5)
        assert "5 examples have no object or rationale" in as_markdown([result], circumstances(), "t")

    def test_our_class_runs_and_labels_are_matched_by_their_beginning(self) -> None:
        one = TextTask("t", "t", tiny_text_model(), Sentences(4), self.METRICS, range(4), k=(1,))
        (batch,) = one.batches(4)
        assert batch.targets["label"].tolist() == [0, 1, 0, 1]
        assert batch.words.count == [len(Sentences(4)[i].words) for i in range(4)]
        (row,) = evaluate(one, resolve(["TransformerRelevance"])).rows
        assert row.error == ""
        assert not any(math.isnan(column.estimate.value) for column in row.columns)

    def test_unknown_words_are_words_and_can_be_removed(self) -> None:
        tokenizer: Any = tiny_text_model().tokenizer
        assert sorted(structural_tokens(tokenizer)) == [0, 2, 3, 4]
        tokenizer.pad_token = tokenizer.unk_token
        assert 1 in structural_tokens(tokenizer)

    def test_without_a_padding_token_one_example_at_a_time(self) -> None:
        model = tiny_text_model()
        model.tokenizer.pad_token = None
        one = TextTask("t", "t", model, Sentences(2), ("perturbation", "saco"), range(2))
        assert evaluate(one, [random_method()], batch_size=1).rows[0].examples == 2
        with pytest.raises(InputError, match="tokenizer of tiny has no padding token: .*batch size 1"):
            evaluate(one, [random_method()], batch_size=2)

    def test_truncated_words_count_as_not_selected(self) -> None:
        one = TextTask("t", "t", tiny_text_model(), Sentences(2), ("rationale",), range(2), k=(1,), max_length=4)
        (batch,) = one.batches(2)
        assert batch.inputs["input_ids"].shape[1] == 4
        assert max(batch.words.count) > 2

    def test_label_that_is_no_class(self) -> None:
        class Foreign(Sentences):
            def load(self, index: int) -> TextExample:
                return TextExample("text", ("w1",), "neutral")

        with pytest.raises(DatasetError, match="label 'neutral', the model's classes are negative, positive"):
            evaluate(TextTask("t", "t", tiny_text_model(), Foreign(1), ("saco",), range(1)), [random_method()])


def test_the_commit_is_that_of_the_package_alone(tmp_path: Path) -> None:
    package = tmp_path / "venv" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "mine.py").write_text("")

    def git(*arguments: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("add", "mine.py")
    git("commit", "-m", "a project that has the package installed")
    assert commit(package) == ""
    git("add", "venv")
    git("commit", "-m", "the package itself")
    assert len(commit(package)) == 10


def test_language_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    prompts = sampled_prompts(model, 6, 9)
    assert prompts.shape == (6, 9)
    assert (prompts[:, 0] == 1).all()
    assert not torch.isin(prompts[:, 1:], torch.tensor([1, 2])).any()
    assert torch.equal(prompts, sampled_prompts(model, 6, 9))
    one = LanguageTask("lm", "lm", model, prompts, ("perturbation", "saco"), range(6))
    result = evaluate(one, [*resolve(["TransformerRelevance", "InputXGradient"]), random_method()], batch_size=4)
    assert [row.error for row in result.rows] == ["", "", ""]
    clean = values(result, "Random")["probability on the whole input"]
    wanted = model(prompts).logits[:, -1].softmax(-1).amax(1).mean().item()
    assert clean == pytest.approx(wanted, rel=1e-5)


def test_captum_metrics_of_the_harness() -> None:
    result = evaluate(task(4, ("captum",)), [PERFECT, random_method()], batch_size=2)
    perfect, random = values(result, "Perfect"), values(result, "Random")
    # The model is linear in the target's quarter, but input times gradient is not the gradient: infidelity is small
    # beside that of noise, not zero.
    assert perfect["infidelity"] < random["infidelity"]
    assert perfect["max. sensitivity"] < random["max. sensitivity"]


class TestReports:
    def result(self) -> Any:
        return evaluate(task(6, ("pointing",)), [PERFECT, INVERTED])

    def test_markdown(self) -> None:
        text = as_markdown([self.result()], circumstances(), "Corners")
        lines = text.splitlines()
        assert lines[0] == "# Corners"
        (head,) = (line for line in lines if line.startswith("| method"))
        (perfect,) = (line for line in lines if line.startswith("| Perfect"))
        (inverted,) = (line for line in lines if line.startswith("| Inverted"))
        assert "pointing ↑" in head
        assert perfect.count("|") == inverted.count("|") == head.count("|")
        assert perfect.split("|")[2].strip() == "**1.000** <sub>1.000–1.000</sub>"
        assert inverted.split("|")[2].strip() == "0.000 <sub>0.000–0.000</sub>"
        assert "Reference: chance 0.250, chance, off-centre" in text
        assert torch.__version__.split("+")[0] in text

    def test_files_are_complete_and_json_is_strict(self, tmp_path: Path) -> None:
        write([self.result()], circumstances(), tmp_path / "new" / "table", "Corners")
        content = json.loads((tmp_path / "new" / "table.json").read_text(), parse_constant=pytest.fail)
        pointing = content["tasks"][0]["methods"]["Perfect"]["metrics"]["pointing"]
        assert pointing == {"value": 1, "low": 1, "high": 1, "examples": 6, "undefined": 0, "better": "higher"}
        assert set(content) == {"machine", "versions", "commit", "command", "date", "tasks"}
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["table.json", "table.md"]


class TestTablesThatAreExtended:
    def test_rows_come_back_as_they_were_with_their_circumstances(self, tmp_path: Path) -> None:
        one = task(6, ("pointing",))
        first = evaluate(one, [PERFECT])
        write([first], {**circumstances(), "command": "the first run"}, tmp_path / "table", "t")
        (row,) = earlier_rows(tmp_path / "table", one.description())
        (measured,) = first.rows
        assert (row.method, row.examples, row.seconds) == (measured.method, measured.examples, measured.seconds)
        assert repr(row.columns) == repr(measured.columns)  # some are NaN
        longer = replace(evaluate(one, [INVERTED]), rows=(row, *evaluate(one, [INVERTED]).rows))
        for _ in range(2):  # a third run still knows the first
            write([longer], {**circumstances(), "command": "a later run"}, tmp_path / "table", "t")
            page = (tmp_path / "table.md").read_text()
            assert page.index("`a later run`") < page.index("Measured earlier: Perfect:") < page.index("the first run")
            found = earlier_rows(tmp_path / "table", one.description())
            assert [r.about["command"] for r in found if r.about] == ["the first run", "a later run"]
            longer = replace(longer, rows=tuple(found))

    def test_no_number_comes_back_as_none(self, tmp_path: Path) -> None:
        one = task(1, ("pointing",))  # a single example has no interval
        write([evaluate(one, [PERFECT])], circumstances(), tmp_path / "table", "t")
        (row,) = earlier_rows(tmp_path / "table", one.description())
        assert math.isnan(row.columns[0].estimate.low)

    def test_tables_of_something_else_give_nothing(self, tmp_path: Path) -> None:
        one, other = task(6, ("pointing",)), task(5, ("pointing",))
        assert earlier_rows(tmp_path / "table", one.description()) == []
        write([evaluate(one, [PERFECT])], circumstances(), tmp_path / "table", "t")
        assert earlier_rows(tmp_path / "table", other.description()) == []
        rounded = {**one.description(), "weights": one.description()["weights"] * (1 + 1e-13)}
        assert len(earlier_rows(tmp_path / "table", rounded)) == 1
        trained = {**one.description(), "weights": one.description()["weights"] * (1 + 1e-6)}
        assert earlier_rows(tmp_path / "table", trained) == []


def test_iterating_twice_reads_the_same() -> None:
    def names(one: ImageTask) -> Iterator[str]:
        return (name for batch in one.batches(4) for name in batch.names)

    one = task(9, ("pointing",), damaged=(3,))
    assert list(names(one)) == list(names(one))
    assert len(one.skipped) == 1
