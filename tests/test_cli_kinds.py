"""Explain for language models, image and text pairs, questions about images and detectors, on tiny random models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from captum_transformer_attr.cli.app import run
from captum_transformer_attr.cli.kinds import detection
from captum_transformer_attr.cli.kinds.detection import object_confidence
from captum_transformer_attr.cli.kinds.language import token_index
from captum_transformer_attr.loading import DetectionModel, LanguageModel, PairModel, load_model

WORDS = ["<pad>", "</s>", "<unk>", "a", "small", "cat", "dog", "sat", "on", "the", "mat", "what", "is", "this", "red"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def tokenizer() -> Any:
    """One token per word, ended by ``</s>`` as the encoders of T5 and CLIP want it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", model_max_length=16
    )


def language_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **SMALL))


def translator() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


def image_text_model() -> Any:
    from transformers import CLIPConfig, CLIPModel

    text = {**SMALL, "vocab_size": len(WORDS), "max_position_embeddings": 16, "eos_token_id": 1}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def answering_model() -> Any:
    from transformers import ViltConfig, ViltForQuestionAnswering

    names = {0: "red", 1: "blue", 2: "a cat"}
    config = ViltConfig(
        **SMALL, vocab_size=len(WORDS), image_size=32, patch_size=8, max_position_embeddings=16, id2label=names
    )
    return ViltForQuestionAnswering(config)


def detector() -> Any:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    config = DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, backbone=None, use_pretrained_backbone=False, d_model=16,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, num_queries=5, id2label={0: "N/A", 1: "cat", 2: "dog"},
    )  # fmt: skip
    return DetrForObjectDetection(config)


def image_processor() -> Any:
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


MODELS: dict[str, tuple[Callable[[], Any], bool, bool]] = {
    "language": (language_model, True, False),
    "translator": (translator, True, False),
    "pair": (image_text_model, True, True),
    "answers": (answering_model, True, True),
    "detector": (detector, False, True),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    for name, (build, reads_text, reads_images) in MODELS.items():
        torch.manual_seed(3)
        build().save_pretrained(folder / name)
        if reads_text:
            tokenizer().save_pretrained(folder / name)
        if reads_images:
            image_processor().save_pretrained(folder / name)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def explain(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command with --json and return its examples."""

    def call(*arguments: Any) -> list[dict[str, Any]]:
        methods = ("--method", "AttentionRelevance,InputXGradient")
        capsys.readouterr()
        assert run(["explain", "--device", "cpu", "--json", *methods, *map(str, arguments)]) == 0, capsys.readouterr()
        return json.loads(capsys.readouterr().out)["examples"]

    return call


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    capsys.readouterr()
    assert run(["explain", "--device", "cpu", "--method", "InputXGradient", *map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.strip().splitlines()) == 1
    assert list(Path().iterdir()) == []
    return captured.err


def test_next_tokens_of_a_prompt(models: Path, explain: Callable[..., Any]) -> None:
    (example,) = explain("the cat sat on", "-m", models / "language", "--top", 3)
    loaded = load_model(str(models / "language"))
    assert isinstance(loaded, LanguageModel)
    with torch.no_grad():
        logits = loaded.model(torch.tensor([[9, 5, 7, 8]])).logits[0, -1]
    best = logits.topk(3).indices.tolist()
    assert [entry["target"] for entry in example["classes"]] == [[3, token] for token in best]
    assert [entry["label"] for entry in example["classes"]] == [WORDS[token] for token in best]
    expected = logits.softmax(-1)[best].tolist()
    assert [entry["probability"] for entry in example["classes"]] == pytest.approx(expected, abs=1e-5)
    (panel,) = example["panels"]
    assert panel["tokens"][WORDS[best[0]]] == ["the", "cat", "sat", "on"]


def test_named_next_tokens(models: Path, explain: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = explain("the cat", "-m", models / "language", "-t", "mat", "-t", "#5")
    assert [entry["label"] for entry in example["classes"]] == ["mat", "cat"]
    assert "2 tokens" in refused(capsys, "the cat", "-m", models / "language", "-t", "red mat")
    assert "#0 to #14" in refused(capsys, "the cat", "-m", models / "language", "-t", "#15")
    assert "leave it out" in refused(capsys, "the cat", "-m", models / "language", "-t", "mat", "--generate", 2)


def test_written_tokens_depend_on_nothing_behind_them(models: Path, explain: Callable[..., Any]) -> None:
    (example,) = explain("the cat sat", "-m", models / "language", "--generate", 3)
    (panel,) = example["panels"]
    labels = [entry["label"] for entry in example["classes"]]
    assert [label[:2] for label in labels] == ["1.", "2.", "3."]
    assert [entry["target"][0] for entry in example["classes"]] == [2, 3, 4]
    for number, label in enumerate(labels):
        assert len(panel["tokens"][label]) == 5
        for scores in panel["scores"][label].values():
            assert not any(scores[3 + number :]) and any(scores[: 3 + number])
    # The second question reads the first written token, and is asked about the second.
    assert panel["tokens"][labels[0]][3] == labels[0][3:]


def test_translations_show_source_and_prefix(models: Path, explain: Callable[..., Any]) -> None:
    (example,) = explain("a small cat", "-m", models / "translator", "--generate", 3)
    source, prefix = example["panels"]
    label = example["classes"][-1]["label"]
    assert source["tokens"][label] == ["a", "small", "cat"]
    assert len(prefix["tokens"][label]) == len(example["classes"]) - 1
    assert any(source["scores"][label]["InputXGradient"])
    first = example["classes"][0]["label"]
    assert not any(prefix["scores"][first]["InputXGradient"])
    (default,) = explain("a small cat", "-m", models / "translator")
    assert 1 <= len(default["classes"]) <= 8


def test_every_text_is_compared_with_the_image(
    models: Path, explain: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["a small cat", "the dog"]
    (example,) = explain(models / "photo.png", "-m", models / "pair", "--text", texts[0], "--text", texts[1])
    assert [entry["label"] for entry in example["classes"]] == texts
    image, text = example["panels"]
    assert image["size"] == [32, 32] and text["tokens"] == {t: t.split() for t in texts}
    loaded = load_model(str(models / "pair"))
    assert isinstance(loaded, PairModel)
    from captum_transformer_attr.loading import read_image

    pixels = loaded.preprocessing(read_image(models / "photo.png"))[None]
    with torch.no_grad():
        fits = [
            loaded.model(**loaded.tokenizer(t, return_tensors="pt"), pixel_values=pixels).logits_per_image[0, 0]
            for t in texts
        ]
    expected = torch.stack(fits).softmax(0).tolist()
    assert [entry["probability"] for entry in example["classes"]] == pytest.approx(expected, abs=1e-5)
    assert np.any(image["scores"][texts[0]]["AttentionRelevance"])
    assert "give at least one --text" in refused(capsys, models / "photo.png", "-m", models / "pair")


def test_answers_to_questions_about_an_image(
    models: Path, explain: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [models / "photo.png", "-m", models / "answers"]
    examples = explain(*arguments, "--text", "what is this", "--text", "is this red", "-t", "a cat", "-t", "blue")
    assert [example["input"] for example in examples] == ["photo.png: what is this", "photo.png: is this red"]
    image, question = examples[0]["panels"]
    assert [entry["label"] for entry in examples[0]["classes"]] == ["a cat", "blue"]
    assert question["tokens"]["blue"] == ["what", "is", "this"]
    assert np.any(image["scores"]["blue"]["AttentionRelevance"]) and any(question["scores"]["blue"]["InputXGradient"])
    assert "ask one with --text" in refused(capsys, *arguments)


def test_objects_are_queries_with_boxes(models: Path, explain: Callable[..., Any]) -> None:
    photo = models / "photo.png"
    (example,) = explain(photo, "-m", models / "detector", "-t", "cat", "-t", "dog", "--html", "objects.html")
    assert [entry["target"][1] for entry in example["classes"]] == [1, 2]
    assert all(", query " in entry["label"] for entry in example["classes"])
    assert Path("objects.html").read_text().count('class="box"') == 4  # two classes, two methods
    (surest,) = explain(photo, "-m", models / "detector")
    assert len(surest["classes"]) >= 1
    loaded = load_model(str(models / "detector"))
    assert isinstance(loaded, DetectionModel)
    from captum_transformer_attr.loading import read_image

    with torch.no_grad():
        logits = loaded.model(loaded.preprocessing(read_image(photo))[None]).logits
    probabilities = logits.softmax(-1)[0, :, :3]
    assert surest["classes"][0]["probability"] == pytest.approx(float(probabilities.max()), abs=1e-5)


def test_summaries_count_the_confident_objects_alone() -> None:
    unsure, sure = [0.2, 0.3], [0.1, 0.9]
    assert detection._summary(torch.tensor([unsure, unsure])) == "no object found with more than 50% confidence"
    assert detection._summary(torch.tensor([unsure, sure])) == "1 object found"
    assert detection._summary(torch.tensor([sure, sure])) == "2 objects found"


def test_confidence_with_and_without_a_nothing_class(models: Path) -> None:
    loaded = load_model(str(models / "detector"))
    assert isinstance(loaded, DetectionModel)
    with_nothing = object_confidence(torch.tensor([[[0.0, 0.0, 0.0, 0.0]]]), loaded)
    assert with_nothing.tolist() == [[[0.25, 0.25, 0.25]]]
    assert object_confidence(torch.zeros(1, 1, 3), loaded).tolist() == [[[0.5, 0.5, 0.5]]]


def test_options_of_other_kinds_are_refused(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--text goes with" in refused(capsys, "the cat", "-m", models / "language", "--text", "a dog")
    assert "--generate goes with" in refused(capsys, models / "photo.png", "-m", models / "detector", "--generate", 2)
    assert "the difference of a class and itself" in refused(
        capsys, "the cat", "-m", models / "language", "--target", "cat > cat"
    )


def test_words_outside_the_vocabulary_are_refused(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "the cat", "--model", models / "language", "--target", "zebra")
    assert "target 'zebra' is not in the vocabulary" in line


def test_words_that_are_tokens_are_found_alone_or_behind_a_space() -> None:
    class Spaced:
        """A tokenizer in which a word at the start and one behind a space are different tokens."""

        known = {"cat": [1], " cat": [2], "dog": [3, 4], " dog": [5]}

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return self.known[text]

    assert token_index(Spaced(), "cat", 10) == 2
    assert token_index(Spaced(), "dog", 10) == 5
