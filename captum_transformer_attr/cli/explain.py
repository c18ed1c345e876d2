"""The ``explain`` command."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from rich.console import Console, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from captum_transformer_attr.cli.cases import Case, explain_cases
from captum_transformer_attr.cli.kinds.answer import answer_cases
from captum_transformer_attr.cli.kinds.detection import detection_case
from captum_transformer_attr.cli.kinds.image import image_case
from captum_transformer_attr.cli.kinds.language import language_case
from captum_transformer_attr.cli.kinds.pair import pair_case
from captum_transformer_attr.cli.kinds.regions import region_cases
from captum_transformer_attr.cli.kinds.text import text_case
from captum_transformer_attr.cli.printing import print_json
from captum_transformer_attr.cli.progress import progress_bar
from captum_transformer_attr.cli.values import names_in, output_file, torch_device
from captum_transformer_attr.comparison import resolve
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.loading import (
    AnswerModel,
    DetectionModel,
    ImageModel,
    LanguageModel,
    LoadedModel,
    PairModel,
    PreprocessingOptions,
    RegionAnswerModel,
    TextModel,
    load_model,
    read_labels,
)
from captum_transformer_attr.loading.words import Merge
from captum_transformer_attr.output_files import check_apart, check_writable, write_files
from captum_transformer_attr.recording.targets import Contrast
from captum_transformer_attr.visualization import Example, ImagePanel, Report, TextPanel, save_html, save_png
from captum_transformer_attr.visualization.figures import missing_letters_note

DEFAULT_METHODS = ("TransformerRelevance", "AttentionRelevance", "AttentionRollout")


@dataclass(frozen=True)
class ExplainRequest:
    """The options of the command, read but not yet looked into."""

    inputs: tuple[str, ...]
    model: str
    checkpoint: Path | None
    texts: tuple[str, ...]
    targets: tuple[str, ...]
    generate: int
    top: int
    methods: tuple[str, ...]
    png: Path | None
    html: Path | None
    json: bool
    labels: Path | None
    class_count: int | None
    merge: str
    preprocessing: PreprocessingOptions
    device: str


def run_explain(request: ExplainRequest) -> None:
    """Load, explain, and write everything at the end, or nothing.

    Raises:
        InputError: for anything wrong with the options, files or the model.
        OSError: if an output cannot be written.
    """
    methods = resolve(names_in("--method", request.methods, DEFAULT_METHODS))
    if request.merge not in get_args(Merge):
        raise InputError(f"--merge must be one of {', '.join(get_args(Merge))}, not {request.merge!r}")
    named = {"--png": request.png, "--html": request.html}
    outputs = [output_file(option, path) for option, path in named.items() if path is not None]
    for path in outputs:
        check_writable(path)
    check_apart(outputs, [*request.inputs, request.model, *filter(None, (request.checkpoint, request.labels))])
    device = torch_device(request.device)
    labels = None if request.labels is None else read_labels(request.labels)
    loaded = load_model(
        request.model, request.checkpoint, request.preprocessing, class_count=request.class_count
    ).with_labels(labels)
    loaded = loaded.to(device, None)
    _check_options(loaded, request)
    cases = [case for given in request.inputs for case in _cases(loaded, given, request, device)]
    with progress_bar() as progress:
        examples = explain_cases(loaded.model, cases, methods, progress)
    report = Report(
        title=f"What {Path(request.model).name} goes by",
        examples=examples,
        description=f"Methods: {', '.join(method.name for method in methods)}.",
    )
    _write(report, request)
    if request.json:
        print_json(json.dumps(as_json(request.model, cases, examples)))
    else:
        _print(examples)


def _check_options(loaded: LoadedModel, request: ExplainRequest) -> None:
    """Refuse options that mean nothing to this kind of model.

    Raises:
        InputError: naming the option.
    """
    if request.generate and not isinstance(loaded, LanguageModel):
        raise InputError(f"--generate goes with language models; {loaded.name} is none")
    if request.texts and not isinstance(loaded, AnswerModel | RegionAnswerModel | PairModel):
        raise InputError(f"--text goes with models that read an image and a text; {loaded.name} does not")
    if request.targets and isinstance(loaded, PairModel):
        raise InputError(
            f"--target goes with classes; {loaded.name} compares an image with texts: name them with --text"
        )
    if request.labels is not None and isinstance(loaded, LanguageModel | PairModel):
        raise InputError(f"--labels goes with classes; {loaded.name} has none")
    if request.preprocessing != PreprocessingOptions() and not hasattr(loaded, "preprocessing"):
        raise InputError(f"--size, --mean, --std and --squash go with models that read images; {loaded.name} does not")


def _cases(loaded: LoadedModel, given: str, request: ExplainRequest, device: torch.device) -> list[Case]:
    merge, targets, top = cast(Merge, request.merge), request.targets, request.top
    if isinstance(loaded, PairModel):
        return [pair_case(loaded, given, request.texts, device, merge)]
    if isinstance(loaded, AnswerModel):
        return answer_cases(loaded, given, request.texts, targets, top, device, merge)
    if isinstance(loaded, RegionAnswerModel):
        return region_cases(loaded, given, request.texts, targets, top, device, merge)
    if isinstance(loaded, ImageModel):
        return [image_case(loaded, given, targets, top, device)]
    if isinstance(loaded, DetectionModel):
        return [detection_case(loaded, given, targets, device)]
    if isinstance(loaded, LanguageModel):
        return [language_case(loaded, given, targets, top, request.generate, device, merge)]
    if isinstance(loaded, TextModel):
        return [text_case(loaded, given, targets, top, device, merge)]
    raise InputError(f"model {loaded.name} takes no kind of input that explain knows")


def _write(report: Report, request: ExplainRequest) -> None:
    writers = {}
    if request.png is not None:
        writers[request.png] = lambda path: save_png(report, path)
    if request.html is not None:
        writers[request.html] = lambda path: save_html(report, path)
    write_files(writers)
    for path in writers:
        print(f"wrote {path}", file=sys.stderr)
    missing = missing_letters_note(report) if request.png is not None else ""
    if missing:
        print(f"{request.png}: {missing}{'' if request.html else ' (--html)'}", file=sys.stderr)


def as_json(model: str, cases: list[Case], examples: tuple[Example, ...]) -> dict[str, Any]:
    """The scores for scripts: class -> method -> scores, nested lists of ``(T,)`` or ``(H, W)``."""
    return {
        "model": model,
        "examples": [
            {
                "input": case.title,
                "note": example.note,
                "classes": [
                    {
                        "label": question.label,
                        "target": _target_as_json(question.target),
                        "probability": question.probability,
                    }
                    for question in case.questions
                ],
                "panels": [_panel_as_json(panel) for panel in example.panels],
            }
            for case, example in zip(cases, examples, strict=True)
        ],
    }


def _target_as_json(target: Any) -> Any:
    return {"first": target.first, "second": target.second} if isinstance(target, Contrast) else target


def _panel_as_json(panel: ImagePanel | TextPanel) -> dict[str, Any]:
    scores = {
        label: {method: _rounded(values.tolist()) for method, values in by_method.items()}
        for label, by_method in panel.scores.items()
    }
    if isinstance(panel, TextPanel):
        tokens = {label: list(panel.tokens_of(label)) for label in panel.scores}
        return {"title": panel.title, "kind": "text", "tokens": tokens, "scores": scores}
    return {"title": panel.title, "kind": "image", "size": list(panel.image.shape[:2]), "scores": scores}


def _rounded(values: Any) -> Any:
    """Seven significant digits: more than the scores have, fewer bytes than repr."""
    return [_rounded(value) for value in values] if isinstance(values, list) else float(f"{values:.7g}")


def _print(examples: tuple[Example, ...]) -> None:
    console = Console()
    for example in examples:
        table = RichTable(title=Text(example.title), title_justify="left", title_style="bold")
        table.add_column("class")
        table.add_column("probability", justify="right")
        words = [panel for panel in example.panels if isinstance(panel, TextPanel)]
        if words:
            table.add_column(f"strongest words ({example.methods[0]})")
        for label in example.classes:
            probability = example.probabilities.get(label)
            cells: list[RenderableType] = [Text(label), "" if probability is None else f"{100 * probability:.1f} %"]
            if words:
                cells.append(Text(_strongest(words[0], label, example.methods[0])))
            table.add_row(*cells)
        console.print(table)
        if example.note:
            console.print(Text(example.note), style="dim", soft_wrap=True)


def _strongest(panel: TextPanel, label: str, method: str, count: int = 5) -> str:
    scores = panel.scores[label][method]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[:count]
    return " · ".join(panel.tokens_of(label)[index] for index in order)
