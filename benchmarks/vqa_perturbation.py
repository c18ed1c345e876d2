"""Bi-modal explanations measured where the relevant region is known: VQA perturbation (ICCV 2021) and detector masks.

    python -m benchmarks.vqa_perturbation                        # docs/results/vqa.md and vqa.json
    python -m benchmarks.vqa_perturbation --count 40 --scenes 5  # a quick look

Questions come from easy-VQA (environment variable CTA_DATA, default ../shared/data), scenes are made on the spot. An
interrupted run goes on where it stopped (`--work`). What stands in the page below the heading "Reading the tables" is
written by hand and kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

from benchmarks.detector_masks import COLUMNS, SEED, measure_masks
from benchmarks.faithfulness_vqa import VqaTask
from benchmarks.trained_models.vqa_models import ARCHITECTURES
from benchmarks.vqa_methods import question_methods
from captum_transformer_attr.cli.progress import progress_bar
from captum_transformer_attr.evaluation import TaskResult, as_json, as_markdown, circumstances, evaluate
from captum_transformer_attr.evaluation.run import Advance
from captum_transformer_attr.evaluation.store import Store
from captum_transformer_attr.metrics import Estimate
from captum_transformer_attr.output_files import write_texts

TITLE = "Bi-modal explanations where the relevant region is known"
NOTES = "## Reading the tables"


def advance_bar(bar: Progress, name: str) -> Advance:
    """A line of the bar that starts anew with every method."""
    line = bar.add_task(name)

    def advance(method: str, done: int, total: int) -> None:
        bar.update(line, completed=done, total=total, description=f"{name}: {method}")

    return advance


def mask_table(masks: Mapping[str, Mapping[str, Estimate]], scenes: int) -> list[str]:
    """The detector's table in Markdown; the best of a column is bold."""
    best = {column: max(row[column].value for row in masks.values()) for column in COLUMNS}
    objects = next(iter(masks.values()))[COLUMNS[0]].count
    lines = [
        f"## DETR on digit scenes: masks of {objects} digits in {scenes} scenes",
        "",
        "| method | " + " | ".join(f"{column} ↑" for column in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, row in masks.items():
        cells = [f"**{row[c].value:.3f}**" if row[c].value == best[c] else f"{row[c].value:.3f}" for c in COLUMNS]
        half = (row[COLUMNS[1]].high - row[COLUMNS[1]].low) / 2
        cells[1] += f" <sub>± {half:.3f}</sub>"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def masks_as_json(masks: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
    """Values with their intervals."""
    return {
        name: {c: {"value": e.value, "low": e.low, "high": e.high, "objects": e.count} for c, e in row.items()}
        for name, row in masks.items()
    }


def notes(page: Path) -> str:
    """The hand-written end of an earlier page."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    _, heading, rest = text.partition(NOTES)
    return f"\n{heading}{rest}" if heading else ""


def main(
    count: Annotated[int, typer.Option(min=2, help="Questions per model; half as many that need the shape.")] = 200,
    scenes: Annotated[int, typer.Option(min=1, help="Scenes for the detector.")] = 40,
    output: Annotated[Path, typer.Option(help="Without ending.")] = Path("docs/results/vqa"),
    work: Annotated[Path, typer.Option(help="Folder that keeps finished work.")] = Path("build/vqa"),
    batch_size: Annotated[int, typer.Option(min=1)] = 20,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Measure and write the tables."""
    torch.set_num_threads(threads)
    results: list[TaskResult] = []
    with progress_bar() as bar:
        for architecture in ARCHITECTURES:
            methods = question_methods(crossing=architecture == "lxmert")
            for only in (False, True):
                task = VqaTask(architecture, count // 2 if only else count, needs_region=only)
                advance = advance_bar(bar, task.name)
                results.append(evaluate(task, methods, batch_size=batch_size, folder=work, advance=advance))
        masks = measure_masks(scenes, Store(work), advance_bar(bar, "detr"))
    facts = circumstances()
    detector = {"scenes": scenes, "seed": SEED, "methods": masks_as_json(masks)}
    page = as_markdown(results, facts, TITLE) + "\n" + "\n".join(mask_table(masks, scenes)) + "\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_texts(
        {
            output.with_suffix(".json"): json.dumps(as_json(results, facts) | {"masks": detector}, indent=1) + "\n",
            output.with_suffix(".md"): page + notes(output.with_suffix(".md")),
        }
    )


if __name__ == "__main__":
    typer.run(main)
