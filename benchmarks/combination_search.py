"""Is there a combination of token maps that is ahead of every single one, in both directions of perturbation?

    python -m benchmarks.combination_search                # every model and data set here
    python -m benchmarks.combination_search swin --count 300
    python -m benchmarks.combination_search --smoke

Candidates are compared on the even half of the examples; the odd half is reported: `docs/results/combination.md` and
`.json`. Data are looked for in the folder of the environment variable CTA_DATA (default ../shared/data).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.data_folder import data_folder
from benchmarks.faithfulness_tasks import TASKS, Options
from captum_transformer_attr.comparison import element_scores, method
from captum_transformer_attr.errors import TransformerAttributionError
from captum_transformer_attr.evaluation import Batch, Task
from captum_transformer_attr.evaluation.machine import circumstances, described
from captum_transformer_attr.evaluation.measures import Perturbation
from captum_transformer_attr.evaluation.run import autocast_forward
from captum_transformer_attr.methods.consensus import shared_ranks
from captum_transformer_attr.metrics import bootstrap, curve_area, perturbation_curve
from captum_transformer_attr.output_files import write_texts

SINGLES = {
    "AttentionRelevance": "AttentionRelevance",
    "FullGradPlus": "FullGradPlus",
    "TransformerRelevance": "TransformerRelevance",
    "AttCAT": "AttCAT",
    "LeGrad": "LeGrad",
    "Libra": "TransformerLRP:rules=libra",
    "AttnLRP": "TransformerLRP:rules=attnlrp",
    "Rollout": "AttentionRollout",
}
A, F, T = "AttentionRelevance", "FullGradPlus", "TransformerRelevance"
CANDIDATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "ranks of AttentionRelevance, FullGradPlus": ("ranks", (A, F)),
    "sum of AttentionRelevance, FullGradPlus": ("sum", (A, F)),
    "product of AttentionRelevance, FullGradPlus": ("product", (A, F)),
    "ranks of TransformerRelevance, FullGradPlus": ("ranks", (T, F)),
    "ranks of AttentionRelevance, TransformerRelevance": ("ranks", (A, T)),
    "ranks of AttentionRelevance, TransformerRelevance, FullGradPlus": ("ranks", (A, T, F)),
    "ranks of AttentionRelevance, Libra": ("ranks", (A, "Libra")),
    "ranks of AttentionRelevance, AttnLRP": ("ranks", (A, "AttnLRP")),
    "ranks of AttentionRelevance, AttCAT": ("ranks", (A, "AttCAT")),
    "ranks of AttentionRelevance, LeGrad": ("ranks", (A, "LeGrad")),
}
COUNTS = {"vit-imagenet": 100, "swin": 200, "digits-vit": 200, "digits-swin": 300, "minilm-sst-removal": 200}
"""Examples of both halves together."""

NOTES = Path(__file__).with_name("combination_notes.md")
"""What a person concluded; goes on top of the page."""

console = Console(stderr=True)


def token_maps(spec: str, task: Task, batch: Batch, target: Tensor, grid: tuple[int, ...] | None) -> Tensor:
    """Scores per token, (N, h, w) or (N, T); pixel-level methods are averaged over the grid's cells."""
    attribution = method(spec)
    scores = attribution.attribute(task.model, batch.inputs, target)
    scores = element_scores(scores["input_ids"] if isinstance(scores, dict) else scores)
    if scores.ndim == 3 and grid is not None:
        scores = torch.nn.functional.adaptive_avg_pool2d(scores, grid)
    return scores


def combined(kind: str, members: list[Tensor]) -> Tensor:
    """Token maps (N, ...) as one."""
    flat = [member.flatten(1) for member in members]
    if kind == "ranks":
        joined = sum(shared_ranks(flat))
    else:
        scaled = [scores / scores.abs().sum(1, keepdim=True).clamp(min=1e-30) for scores in flat]
        if kind == "sum":
            joined = sum(scaled)
        else:
            joined = torch.stack([scores.clamp(min=0) for scores in scaled]).prod(0)
    return torch.as_tensor(joined).view_as(members[0])


@dataclass
class Curves:
    """Areas under the perturbation curves per method and direction, one number per example."""

    areas: dict[str, dict[str, list[Tensor]]]

    def add(self, name: str, order: str, area: Tensor) -> None:
        self.areas.setdefault(name, {}).setdefault(order, []).append(area.cpu())

    def joined(self, name: str, order: str) -> Tensor:
        return torch.cat(self.areas[name][order])


def measure(
    task: Task, names: list[str], batch_size: int, precision: torch.dtype | None, tell: Callable[[str], None]
) -> tuple[Curves, dict[str, str]]:
    """Perturbation of every single method and candidate in `names`; which of them refuse the model, and why."""
    forward = task.model if precision is None else autocast_forward(task.model, precision, task.device)
    perturbations = [m for m in task.measures if isinstance(m, Perturbation) and not m.label]
    curves, refused = Curves({}), dict[str, str]()
    done = 0
    for batch in task.batches(batch_size):
        role = perturbations[0].roles[0]
        target = batch.targets[role]
        grid = None if isinstance(batch.inputs, dict) else grid_of(task, batch, target)
        maps: dict[str, Tensor] = {}
        needed = {member for name in names for member in CANDIDATES.get(name, ("", (name,)))[1]}
        for single, spec in SINGLES.items():
            if single in needed and single not in refused:
                try:
                    maps[single] = token_maps(spec, task, batch, target, grid)
                except TransformerAttributionError as error:
                    refused[single] = " ".join(str(error).split())
        for name, (kind, members) in CANDIDATES.items():
            if name in names and all(member in maps for member in members):
                maps[name] = combined(kind, [maps[member] for member in members])
        for name in names:
            if name not in maps:
                continue
            for perturbation in perturbations:
                curve = perturbation_curve(
                    forward,
                    batch.inputs,
                    maps[name],
                    batch.targets[perturbation.asked],
                    order=perturbation.order,
                    removal=perturbation.removal,
                    measure=perturbation.measure,
                    clean_scores=batch.logits,
                )
                curves.add(name, perturbation.order, curve_area(curve, perturbation.removal.fractions))
        done += len(batch)
        tell(f"{task.name}: {done} of {len(task.indices)}")
    return curves, refused


def grid_of(task: Task, batch: Batch, target: Tensor) -> tuple[int, ...]:
    """The model's finest grid of tokens."""
    from captum_transformer_attr import AttentionRelevance

    if not hasattr(task, "_grid"):
        task._grid = AttentionRelevance(task.model).attribute_tokens(batch.inputs[:1], target[:1]).shape[1:]  # type: ignore[attr-defined,index]
    return tuple(task._grid)  # type: ignore[attr-defined]


def table(curves: Curves) -> dict[str, Any]:
    """Means with intervals, and the paired differences to the best single method of either direction."""
    result: dict[str, Any] = {}
    singles = [name for name in curves.areas if name in SINGLES]
    for order, better in (("positive", min), ("negative", max)):
        means = {name: float(curves.joined(name, order).mean()) for name in curves.areas}
        best = better(singles, key=lambda name: means[name])
        for name in curves.areas:
            (area,) = bootstrap(curves.joined(name, order))
            (ahead,) = bootstrap(curves.joined(name, order) - curves.joined(best, order))
            result.setdefault(name, {})[order] = {
                "value": area.value,
                "low": area.low,
                "high": area.high,
                "best_single": best,
                "difference": [ahead.value, ahead.low, ahead.high],
            }
    return result


def ahead_in_both(rows: dict[str, Any], name: str) -> bool:
    """Whether a combination's means are better than every single method's."""
    return rows[name]["positive"]["difference"][0] <= 0 and rows[name]["negative"]["difference"][0] >= 0


def markdown(found: dict[str, Any], about: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Combinations of token maps",
        "",
        *([NOTES.read_text().strip(), ""] if NOTES.is_file() else []),
        described(about),
        "",
        "Perturbation AUC (positive ↓, negative ↑) of single methods and of their combinations, explaining the"
        " predicted class (the digits: a digit of the scene). Candidates were compared on the even half; the odd half"
        " is the report. Δ is the paired difference to the best single method of that direction and half, with a 95 %"
        " bootstrap interval. ✓: at least as good as every single method in both directions.",
    ]
    for halves in found.values():
        lines += ["", f"## {halves['title']}", ""]
        for half in ("even", "odd"):
            rows = halves[half]["rows"]
            lines += [
                f"{'Development' if half == 'even' else 'Report'}: {half} half, {halves[half]['examples']} examples.",
                "",
                "| map | positive ↓ | Δ | negative ↑ | Δ | |",
                "|---|---|---|---|---|---|",
            ]
            for row, entry in rows.items():
                cells = []
                for order in ("positive", "negative"):
                    value, (delta, low, high) = entry[order]["value"], entry[order]["difference"]
                    cells += [f"{value:.2f}", f"{delta:+.2f} <sub>{low:+.2f} … {high:+.2f}</sub>"]
                mark = "✓" if row in CANDIDATES and ahead_in_both(rows, row) else ""
                lines.append("| " + " | ".join([row, *cells, mark]) + " |")
            lines.append("")
        lines += [f"- {single}: {why}" for single, why in halves["refused"].items()]
    return "\n".join(lines).rstrip() + "\n"


def main(
    tasks: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(COUNTS)}.")] = None,
    count: Annotated[int | None, typer.Option(help="Examples of both halves together.")] = None,
    rows: Annotated[list[str] | None, typer.Option(help="Single methods and candidates instead of all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 25,
    precision: Annotated[str, typer.Option(help="Of the model asked about altered inputs.")] = "bfloat16",
    output: Annotated[Path, typer.Option(help="Folder of the table.")] = Path("docs/results"),
    threads: Annotated[int | None, typer.Option(help="Of torch on the CPU.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Four examples.")] = False,
) -> None:
    """Measure both halves and write the table; tasks already in the JSON file and not asked for stay."""
    unknown = [name for name in tasks or () if name not in COUNTS]
    if unknown:
        raise typer.BadParameter(f"no task {unknown[0]}; tasks: {', '.join(COUNTS)}")
    strange = [row for row in rows or () if row not in SINGLES and row not in CANDIDATES]
    if strange:
        raise typer.BadParameter(f"no row {strange[0]}; rows: {'; '.join([*SINGLES, *CANDIDATES])}")
    if threads:
        torch.set_num_threads(threads)
    data = data_folder()
    stem = output / "combination.json"
    found = json.loads(stem.read_text())["tasks"] if stem.is_file() and not smoke else {}
    for name in tasks or COUNTS:
        if any(not (data / folder).is_dir() for folder in TASKS[name].needs):
            console.print(f"{name}: skipped, its data are not in {data} (set CTA_DATA)")
            continue
        output.mkdir(parents=True, exist_ok=True)
        start, halves = time.perf_counter(), {}
        for half in ("even", "odd"):
            task = TASKS[name].build(Options(data, 4 if smoke else count or COUNTS[name], half, 64 if smoke else None))
            curves, refused = measure(
                task,
                rows or [*SINGLES, *CANDIDATES],
                batch_size,
                None if precision == "float32" else torch.bfloat16,
                console.print,
            )
            halves[half] = {"examples": len(task.indices), "rows": table(curves)}
        found[name] = {"title": task.title, **halves, "refused": refused}
        about = circumstances()
        content = json.dumps({**about, "tasks": found}, indent=1) + "\n"
        write_texts({stem: content, stem.with_suffix(".md"): markdown(found, about)})
        console.print(f"{name}: {time.perf_counter() - start:.0f} s, {stem.with_suffix('.md')}")


if __name__ == "__main__":
    typer.run(main)
