"""The ``evaluate`` command: a method by metric table on a data set."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from captum_transformer_attr.cli.printing import print_json
from captum_transformer_attr.cli.progress import progress_bar
from captum_transformer_attr.cli.values import names_in, output_file, torch_device
from captum_transformer_attr.comparison import resolve
from captum_transformer_attr.datasets import (
    BoxedImages,
    CocoInstances,
    Eraser,
    ImageNetSegmentation,
    ImageNetValidation,
    LabelledImages,
    Reader,
    Sst2,
    SstRationales,
    TinyImageNetValidation,
)
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.evaluation import (
    CENTER,
    RANDOM,
    ImageTask,
    Task,
    TaskResult,
    TextTask,
    as_json,
    as_markdown,
    center_method,
    circumstances,
    evaluate,
    random_method,
    spread,
)
from captum_transformer_attr.evaluation.digits import DigitTask
from captum_transformer_attr.evaluation.images import METRICS as IMAGE_METRICS
from captum_transformer_attr.evaluation.texts import METRICS as TEXT_METRICS
from captum_transformer_attr.loading import ImageModel, PreprocessingOptions, TextModel, load_model
from captum_transformer_attr.output_files import check_apart, check_writable, write_texts

DEFAULT_METHODS = (
    "TransformerRelevance",
    "AttentionRelevance",
    "AttentionRollout",
    "RawAttention",
    "InputXGradient",
    RANDOM,
)
DIGITS = "digit-scenes"


@dataclass(frozen=True)
class DataSet:
    """A data set the command knows.

    Attributes:
        reader: From the path and ``--annotations`` to the reader.
        metrics: What is measured unless the user says otherwise.
        annotations: Whether it needs a second file; None where it can have one.
        mask_role: Whose object its masks show, for images.
    """

    reader: Callable[[Path, Path | None], Reader[Any]]
    metrics: tuple[str, ...]
    annotations: bool | None = False
    mask_role: str = "label"


IMAGES = {
    "images": DataSet(lambda path, _: LabelledImages(path), ("perturbation",)),
    "imagenet": DataSet(
        lambda path, devkit: ImageNetValidation(path, devkit=devkit), ("perturbation",), annotations=None
    ),
    "imagenet-segmentation": DataSet(
        lambda path, _: ImageNetSegmentation(path), ("segmentation",), mask_role="predicted"
    ),
    "tiny-imagenet": DataSet(lambda path, _: TinyImageNetValidation(path), ("pointing",)),
    "boxed-images": DataSet(lambda path, index: BoxedImages(path, cast(Path, index)), ("pointing",), annotations=True),
    # Many objects of many categories per picture, no one label: the predicted class is explained.
    "coco": DataSet(
        lambda path, index: CocoInstances(path, cast(Path, index)),
        ("pointing",),
        annotations=True,
        mask_role="predicted",
    ),
}
TEXTS = {
    "sst2": DataSet(lambda path, _: Sst2(path), ("perturbation",)),
    "sst-rationales": DataSet(lambda path, _: SstRationales(path), ("rationale", "perturbation")),
    "eraser": DataSet(lambda path, _: Eraser(path), ("rationale",)),
}
NAMES = (DIGITS, *IMAGES, *TEXTS)


@dataclass(frozen=True)
class EvaluateRequest:
    """The options of the command, read but not yet looked into."""

    data: str
    path: Path | None
    annotations: Path | None
    model: str
    checkpoint: Path | None
    class_count: int | None
    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    count: int
    batch_size: int
    output: Path | None
    resume: Path | None
    json: bool
    device: str
    seed: int


def run_evaluate(request: EvaluateRequest) -> None:
    """Measure, print, and write everything at the end, or nothing.

    Raises:
        InputError: for anything wrong with the options, the data or the model.
        OSError: if an output cannot be written.
    """
    methods = _methods(request)
    files = {}
    if request.output is not None:
        name = output_file("--output", request.output)
        files = {kind: _with_suffix(name, kind) for kind in (".md", ".json")}
    for path in files.values():
        check_writable(path)
    given = (request.path, request.annotations, request.checkpoint, request.model)
    check_apart(files.values(), filter(None, given))
    task = _task(request)
    with progress_bar() as progress:
        bar = progress.add_task("evaluating", total=len(methods) * len(task.indices))
        finished: dict[str, int] = {}

        def advance(method: str, done: int, _: int) -> None:
            finished[method] = done
            progress.update(bar, description=method, completed=sum(finished.values()))

        result = evaluate(
            task,
            methods,
            batch_size=request.batch_size,
            folder=request.resume,
            advance=advance,
            seed=request.seed,
        )
    if all(row.error for row in result.rows):
        raise InputError(f"no method gives a result; {result.rows[0].method}: {result.rows[0].error}")
    about = circumstances(task.device)
    page = as_markdown([result], about, result.title)
    content = json.dumps(as_json([result], about), indent=1) + "\n"
    if files:
        write_texts({files[".md"]: page, files[".json"]: content})
        print(f"wrote {files['.md']} and {files['.json']}", file=sys.stderr)
    if request.json:
        print_json(content)
    else:
        _print(result)


def _methods(request: EvaluateRequest) -> list[Any]:
    controls = {RANDOM: lambda: random_method(request.seed), CENTER: center_method}
    named = names_in("--method", request.methods, DEFAULT_METHODS)
    return resolve([controls[name]() if name in controls else name for name in named])


def _task(request: EvaluateRequest) -> Task:
    if request.data not in NAMES:
        raise InputError(f"data set {request.data!r} is unknown; known: {', '.join(NAMES)}")
    metrics = tuple(names_in("--metric", request.metrics, ()))
    device = torch_device(request.device)
    if request.data == DIGITS:
        if request.model not in ("embedded", "embedded-swin"):
            raise InputError(f"{DIGITS} are explained by --model embedded or embedded-swin, not {request.model}")
        if any(given is not None for given in (request.path, request.annotations, request.checkpoint)):
            raise InputError(
                f"{DIGITS} are drawn, not read, and bring their model: leave out path, annotations, weights"
            )
        architecture = "vit" if request.model == "embedded" else "swin"
        chosen = _checked(metrics or ("pointing", "discriminativeness"), IMAGE_METRICS)
        task: Task = DigitTask(architecture, request.count, seed=request.seed, metrics=chosen)  # type: ignore[arg-type]
        task.model.to(device)
        return task
    data = IMAGES.get(request.data) or TEXTS[request.data]
    if request.path is None:
        raise InputError(f"data set {request.data} needs the folder or file it is in, as the second argument")
    if data.annotations and request.annotations is None:
        raise InputError(f"data set {request.data} needs its annotation file: --annotations")
    if data.annotations is False and request.annotations is not None:
        raise InputError(f"data set {request.data} has no file of annotations: leave out --annotations")
    reader = data.reader(request.path, request.annotations)
    # The protocols squash the whole picture, so that masks and boxes stay where their objects are.
    loaded = load_model(
        request.model, request.checkpoint, PreprocessingOptions(squash=True), class_count=request.class_count
    ).to(device, None)
    title = f"{loaded.name} on {request.data} ({request.path.name})"
    if not len(reader):
        raise InputError(f"data set {request.path} holds no example")
    indices = spread(len(reader), request.count)
    if request.data in IMAGES:
        if not isinstance(loaded, ImageModel):
            raise InputError(f"data set {request.data} holds images, model {loaded.name} reads text")
        chosen = _checked(metrics or data.metrics, IMAGE_METRICS)
        return ImageTask(request.data, title, loaded, reader, chosen, indices, mask_role=data.mask_role)
    if not isinstance(loaded, TextModel):
        raise InputError(f"data set {request.data} holds text, model {loaded.name} reads images")
    return TextTask(request.data, title, loaded, reader, _checked(metrics or data.metrics, TEXT_METRICS), indices)


def _checked(metrics: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    for name in metrics:
        if name not in known:
            raise InputError(f"metric {name!r} is unknown here; known: {', '.join(known)}")
    return metrics


def _with_suffix(path: Path, suffix: str) -> Path:
    return (
        path if path.suffix == suffix else path.with_name(path.name.removesuffix(".md").removesuffix(".json") + suffix)
    )


def _print(result: TaskResult) -> None:
    """Methods as columns: there are often more metrics than fit side by side."""
    console = Console()
    rows = [row for row in result.rows if not row.error]
    table = RichTable(title=Text(result.title), title_justify="left", title_style="bold")
    table.add_column("")
    for row in rows:
        table.add_column(Text(row.method), justify="right", overflow="fold")
    arrows = {"lower": " ↓", "higher": " ↑", "": ""}
    for index, column in enumerate(rows[0].columns if rows else ()):
        values = [f"{row.columns[index].estimate.value:.3f}" for row in rows]
        table.add_row(column.name + arrows[column.better], *values)
    if rows:
        table.add_row("seconds per example", *(f"{row.seconds:.3g}" for row in rows))
        console.print(table)
    for row in result.rows:
        if row.error:
            console.print(Text(f"{row.method}: {row.error}"))
    if result.skipped:
        console.print(Text(f"{len(result.skipped)} examples skipped, e.g. {result.skipped[0]}"))
