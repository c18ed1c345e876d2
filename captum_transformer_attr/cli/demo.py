"""The ``demo`` command: digits in cluttered scenes, explained class by class, measured against their exact pixels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as RichTable
from torch import Tensor

from captum_transformer_attr.cli.cases import Case, ImageView, Question, explain_cases
from captum_transformer_attr.cli.kinds.image import image_scores
from captum_transformer_attr.cli.printing import print_json
from captum_transformer_attr.cli.progress import progress_bar
from captum_transformer_attr.comparison import Method, element_scores, resolve
from captum_transformer_attr.digit_scenes import DigitScenes, load_swin, load_vit, make_scenes
from captum_transformer_attr.loading import ImageModel
from captum_transformer_attr.loading.timm_models import image_model
from captum_transformer_attr.metrics import mass_in_mask, pointing_game
from captum_transformer_attr.output_files import check_writable, write_files
from captum_transformer_attr.visualization import Example, Report, Table, save_html, save_png

METHODS = (
    "TransformerRelevance",
    "AttentionRelevance",
    "AttentionRollout",
    "RawAttention",
    "IntegratedGradients:n_steps=10",
    "InputXGradient",
)
SHOWN = {"embedded": 4, "embedded-swin": 2}
"""Scenes shown per model."""
BATCH = 40
COLUMNS = ("pointing game", "mass in mask", "right digit")
CAPTION = (
    "One digit of each scene is explained. Pointing game: the map's maximum lies on the digit's ink. Mass in mask: "
    "share of the positive relevance on its ink. Right digit: share of the relevance on any digit that lies on the one "
    "asked for. Chance is what a constant map reaches."
)


@dataclass(frozen=True)
class MeasuredModel:
    """One of the embedded models, its methods and what was found."""

    loaded: ImageModel
    examples: tuple[Example, ...]
    table: Table


def run_demo(folder: Path, scene_count: int, seed: int, *, as_json: bool = False) -> None:
    """Explain, measure, print the table, and write ``demo.html``, ``demo.png`` and a scene to try ``explain`` on.

    Args:
        folder: Where to write; made if missing.
        scene_count: Scenes that the table rests on.
        seed: Of the scenes.
        as_json: Print the tables as JSON and nothing else.

    Raises:
        OSError: if the folder cannot be written.
    """
    made = _make_folder(folder)
    try:
        page, picture, scene = folder / "demo.html", folder / "demo.png", folder / "scene.png"
        for path in (page, picture, scene):
            check_writable(path)
        report, first = _explain_and_measure(scene_count, seed)
        write_files(
            {
                page: lambda path: save_html(report, path),
                picture: lambda path: save_png(report, path),
                scene: lambda path: Image.fromarray(first).save(path, format="PNG"),
            }
        )
    except BaseException:
        if made:
            folder.rmdir()
        raise
    if as_json:
        tables = {t.title: {name: dict(zip(t.columns, v, strict=True)) for name, v in t.rows} for t in report.tables}
        print_json(json.dumps(tables, indent=1))
        return
    console = Console()
    for table in report.tables:
        console.print(_rich(table))
    console.print(CAPTION, style="dim")
    console.print(f"\nOpen the page: {page.resolve().as_uri()}", soft_wrap=True, highlight=False)
    console.print(f"Explain a scene yourself: captum-transformer-attr explain {scene}", soft_wrap=True, highlight=False)


def _make_folder(folder: Path) -> bool:
    """Make the folder; whether it was missing.

    Raises:
        OSError: naming the option and the path.
    """
    if folder.is_dir():
        return False
    try:
        folder.mkdir()
    except OSError as error:
        reason = "it is a file" if folder.exists() else error.strerror
        raise OSError(f"--output {folder} cannot be made a folder: {reason}") from error
    return True


def _explain_and_measure(scene_count: int, seed: int) -> tuple[Report, Any]:
    methods = resolve(METHODS)
    scenes = make_scenes(scene_count, "test", seed)
    digits = _one_digit_each(scenes, seed)
    results = []
    with progress_bar() as progress:
        for name, model in (("embedded", load_vit()), ("embedded-swin", load_swin())):
            loaded = image_model(name, model, multi_label=True)
            title = "ViT" if name == "embedded" else "Swin"
            rows = _measure(loaded, scenes, digits, methods, progress, title)
            table = Table(f"{title}, {scene_count} scenes", COLUMNS, rows, CAPTION, (True, True, True))
            cases = [_case(loaded, scenes, index, title) for index in range(SHOWN[name])]
            results.append(MeasuredModel(loaded, explain_cases(model, cases, methods, progress), table))
    report = Report(
        title="Which digit are you looking for?",
        examples=tuple(example for result in results for example in result.examples),
        tables=tuple(result.table for result in results),
        description="Two tiny transformers say which handwritten digits are in a scene. Choose a digit: a "
        "class-specific explanation moves to it, attention alone does not.",
    )
    first = (scenes.images[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    return report, first


def _one_digit_each(scenes: DigitScenes, seed: int) -> Tensor:
    """A random present digit per scene, ``(N,)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(scenes.labels, 1, generator=generator)[:, 0]


def _measure(
    loaded: ImageModel,
    scenes: DigitScenes,
    digits: Tensor,
    methods: list[Method],
    progress: Progress,
    title: str,
) -> tuple[tuple[str, tuple[float | None, ...]], ...]:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (loaded.preprocessing.mean, loaded.preprocessing.std))
    inputs = (scenes.images - mean) / std
    examples = torch.arange(len(scenes))
    masks, any_digit = scenes.masks[examples, digits], scenes.masks.any(1)
    task = progress.add_task(f"measuring {title}", total=len(methods) * len(scenes))
    rows: list[tuple[str, tuple[float | None, ...]]] = []
    for method in methods:
        scores = []
        for batch in examples.split(BATCH):
            scores.append(element_scores(method.attribute(loaded.model, inputs[batch], digits[batch])))
            progress.advance(task, len(batch))
        rows.append((method.name, _localisation(torch.cat(scores), masks, any_digit)))
    progress.remove_task(task)
    constant = torch.ones(masks.shape)
    return (*rows, ("chance", _localisation(constant, masks, any_digit)))


def _localisation(maps: Tensor, masks: Tensor, any_digit: Tensor) -> tuple[float, float, float]:
    """The three columns for maps ``(N, H, W)``."""
    return (
        float(pointing_game(maps, masks).hit.mean()),
        float(mass_in_mask(maps, masks).mean()),
        float(mass_in_mask(maps * any_digit, masks).mean()),
    )


def _case(loaded: ImageModel, scenes: DigitScenes, index: int, title: str) -> Case:
    pixels = loaded.preprocessing(_picture(scenes.images[index]))
    present = scenes.labels[index].nonzero()[:, 0].tolist()
    with torch.no_grad():
        probabilities = loaded.probabilities(loaded.model(pixels[None]))[0]
    questions = tuple(Question(f"digit {digit}", digit, pixels[None], float(probabilities[digit])) for digit in present)
    view = ImageView("scene", loaded.preprocessing.picture(pixels), image_scores)
    return Case(f"{title}, scene {index + 1}", questions, (view,))


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def _rich(table: Table) -> RichTable:
    shown = RichTable(title=table.title, title_justify="left", title_style="bold")
    shown.add_column("method")
    for column in table.columns:
        shown.add_column(column, justify="right")
    best = [table.best_row(column) for column in range(len(table.columns))]
    for index, (name, values) in enumerate(table.rows):
        cells = [
            f"[bold]{value:.3f}[/bold]" if best[column] == index else f"{value:.3f}" if value is not None else "–"
            for column, value in enumerate(values)
        ]
        shown.add_row(name, *cells)
    return shown
