"""The models and data sets of the faithfulness tables, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captum_transformer_attr.datasets import (
    BoxedImages,
    Eraser,
    Joined,
    LabelledImages,
    SstRationales,
    TinyImageNetValidation,
)
from captum_transformer_attr.evaluation import ImageTask, Task, TextTask, spread
from captum_transformer_attr.evaluation.digits import DigitTask
from captum_transformer_attr.evaluation.language import LanguageTask, sampled_prompts
from captum_transformer_attr.loading import PreprocessingOptions, load_model

HALF = (0.5, 0.5, 0.5)
SQUARES = ("perturbation-squares", "saco", "discriminativeness")


@dataclass(frozen=True)
class Options:
    """What a task is built with.

    Attributes:
        data: the folder of the shared data.
        count: examples, None for the task's own number.
        half: `"even"`, `"odd"` or `"all"` of them.
        max_length: tokens kept of a text.
    """

    data: Path
    count: int | None = None
    half: str = "all"
    max_length: int | None = None

    def indices(self, length: int, count: int) -> list[int]:
        """Which examples of a data set; the odd half first, so that a run over all goes on from one over that half."""
        number = self.count or count
        if self.half != "all":
            return spread(length, number, self.half)
        return spread(length, number, "odd") + spread(length, number, "even")


def _vit(options: Options) -> Any:
    weights = options.data / "vit_tiny_imagenet" / "model.safetensors"
    return load_model("vit_tiny_patch16_224", weights, PreprocessingOptions(mean=HALF, std=HALF, squash=True))


def _vit_imagenet(options: Options, metrics: tuple[str, ...] = ("perturbation",), name: str = "vit-imagenet") -> Task:
    reader = LabelledImages(options.data / "imagenet_samples")
    indices = options.indices(len(reader), 300 if metrics == ("perturbation",) else 60)
    return ImageTask(name, "ViT-Tiny on ImageNet samples", _vit(options), reader, metrics, indices)


def _vit_imagenet_captum(options: Options) -> Task:
    return _vit_imagenet(options, ("captum",), "vit-imagenet-captum")


def _vit_imagenet_squares(options: Options) -> Task:
    return _vit_imagenet(options, SQUARES, "vit-imagenet-squares")


def _vit_boxes(options: Options) -> Task:
    reader = TinyImageNetValidation(options.data / "tiny_imagenet_val" / "val.tar.gz")
    indices = options.indices(len(reader), 300)
    metrics = ("pointing", "corners")
    return ImageTask("vit-boxes", "ViT-Tiny on Tiny ImageNet boxes", _vit(options), reader, metrics, indices)


def _swin_parts(options: Options) -> Any:
    """The model and its held-out images."""
    folder = options.data / "swin_tinyimagenet20"
    model = load_model(str(folder / "model.safetensors"), None, PreprocessingOptions(squash=True))
    return model, BoxedImages(folder / "validation_images.zip", folder / "validation.json")


def _swin(options: Options) -> Task:
    model, reader = _swin_parts(options)
    indices = options.indices(len(reader), 300)
    return ImageTask("swin", "Swin on its held-out images", model, reader, STATISTICS, indices)


def _swin_squares(options: Options) -> Task:
    """Squares of 8 x 8 pixels: single ones, and the model's patches of 4 x 4, are noise that it has never seen."""
    model, reader = _swin_parts(options)
    title = "Swin on its held-out images, squares of 8 x 8 pixels removed"
    indices = options.indices(len(reader), 100)
    return ImageTask("swin-squares", title, model, reader, ("perturbation-squares",), indices, square=8)


STATISTICS = ("perturbation", "discriminativeness", "pointing", "corners")


def _swin_statistics(options: Options) -> Task:
    model, reader = _swin_parts(options)
    return ImageTask(
        "swin-statistics",
        "Swin and layer-norm statistics",
        model,
        reader,
        STATISTICS,
        options.indices(len(reader), 300),
    )  # type: ignore[arg-type]


def _vit_statistics(options: Options) -> Task:
    reader = TinyImageNetValidation(options.data / "tiny_imagenet_val" / "val.tar.gz")
    indices = options.indices(len(reader), 300)
    title = "ViT-Tiny and layer-norm statistics"
    return ImageTask("vit-statistics", title, _vit(options), reader, ("pointing", "corners"), indices)


def _sst(options: Options, metrics: tuple[str, ...] = ("rationale",), name: str = "minilm-sst") -> Task:
    model: Any = load_model(str(options.data / "minilm_sst2"))
    reader = SstRationales(options.data / "sst_rationales" / "sst_rationales.jsonl")
    indices = options.indices(len(reader), 263 if "rationale" in metrics else 60)
    title = "MiniLM on SST sentences with rationales"
    return TextTask(name, title, model, reader, metrics, indices, k=(1, 3, 5, 8), max_length=options.max_length)


def _sst_removal(options: Options) -> Task:
    return _sst(options, ("perturbation", "perturbation-mask", "saco"), "minilm-sst-removal")


def _movies(options: Options, metrics: tuple[str, ...] = ("rationale",), name: str = "minilm-movies") -> Task:
    model: Any = load_model(str(options.data / "minilm_sst2"))
    reader = Joined(*(Eraser(options.data / "eraser_movies", split) for split in ("val", "test")))
    indices = options.indices(len(reader), 399 if "rationale" in metrics else 60)
    title = "MiniLM on ERASER movie reviews"
    return TextTask(name, title, model, reader, metrics, indices, max_length=options.max_length)


def _movies_removal(options: Options) -> Task:
    return _movies(options, ("perturbation",), "minilm-movies-removal")


def _digits_vit(options: Options) -> Task:
    return DigitTask("vit", options.count or 300, options.half)


def _digits_swin(options: Options) -> Task:
    return DigitTask("swin", options.count or 300, options.half)


def _stories(options: Options) -> Task:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.data / "stories260k").eval()
    number = options.count or 300
    prompts = sampled_prompts(model, number, 32)
    title = "Llama (stories260k), next token after 31 sampled tokens"
    return LanguageTask("stories", title, model, prompts, ("perturbation", "saco"), options.indices(number, number))


def _visualbert(options: Options) -> Task:
    from benchmarks.faithfulness_vqa import VqaTask

    return VqaTask("visualbert", options.count or 300, options.half)


def _lxmert(options: Options) -> Task:
    from benchmarks.faithfulness_vqa import VqaTask

    return VqaTask("lxmert", options.count or 300, options.half)


@dataclass(frozen=True)
class Entry:
    """A task that can be asked for.

    Attributes:
        build: makes it.
        kind: `"image"`, `"statistics"`, `"text"`, ...: which methods it is measured with by default.
        needs: folders below the data folder.
    """

    build: Callable[[Options], Task]
    kind: str
    needs: tuple[str, ...] = ()


TASKS: dict[str, Entry] = {
    "digits-vit": Entry(_digits_vit, "image"),
    "digits-swin": Entry(_digits_swin, "image"),
    "vit-imagenet": Entry(_vit_imagenet, "image", ("vit_tiny_imagenet", "imagenet_samples")),
    "vit-imagenet-squares": Entry(_vit_imagenet_squares, "image", ("vit_tiny_imagenet", "imagenet_samples")),
    "vit-imagenet-captum": Entry(_vit_imagenet_captum, "fast", ("vit_tiny_imagenet", "imagenet_samples")),
    "vit-boxes": Entry(_vit_boxes, "image", ("vit_tiny_imagenet", "tiny_imagenet_val")),
    "swin": Entry(_swin, "image", ("swin_tinyimagenet20",)),
    "swin-statistics": Entry(_swin_statistics, "statistics", ("swin_tinyimagenet20",)),
    "swin-squares": Entry(_swin_squares, "image", ("swin_tinyimagenet20",)),
    "vit-statistics": Entry(_vit_statistics, "statistics", ("vit_tiny_imagenet", "tiny_imagenet_val")),
    "minilm-sst": Entry(_sst, "text", ("minilm_sst2", "sst_rationales")),
    "minilm-sst-removal": Entry(_sst_removal, "text", ("minilm_sst2", "sst_rationales")),
    "minilm-movies": Entry(_movies, "reviews", ("minilm_sst2", "eraser_movies")),
    "minilm-movies-removal": Entry(_movies_removal, "reviews", ("minilm_sst2", "eraser_movies")),
    "stories": Entry(_stories, "text", ("stories260k",)),
    "visualbert": Entry(_visualbert, "question", ("easy_vqa",)),
    "lxmert": Entry(_lxmert, "question", ("easy_vqa",)),
}
