"""Results as Markdown tables and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from captum_transformer_attr.evaluation.machine import described
from captum_transformer_attr.evaluation.measures import Column
from captum_transformer_attr.evaluation.run import MethodRow, TaskResult
from captum_transformer_attr.metrics.bootstrap import Estimate
from captum_transformer_attr.output_files import write_texts

ARROWS = {"lower": " ↓", "higher": " ↑", "": ""}
NAMED_SKIPS = 5


def as_json(results: Sequence[TaskResult], circumstances: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, machine-readable: per task and method every number with its interval."""
    return {**circumstances, "tasks": [_task_json(result) for result in results]}


def as_markdown(results: Sequence[TaskResult], circumstances: Mapping[str, Any], title: str) -> str:
    """One table per task; the best value of a column is bold, intervals are 95 % bootstrap intervals over examples."""
    lines = [
        f"# {title}",
        "",
        described(circumstances),
        "",
        "Values with 95 % bootstrap intervals over the examples; ↓ lower is better, ↑ higher is better, bold: best of"
        " the column. Seconds are per example and include every class that the columns ask for.",
    ]
    for result in results:
        lines += ["", f"## {result.title}", "", *_table(result), *_earlier_runs(result)]
    return "\n".join(lines) + "\n"


def earlier_rows(stem: Path, description: Mapping[str, Any]) -> list[MethodRow]:
    """The rows of a table that is there already, if it measures the same.

    Args:
        stem: as `write` was given it.
        description: of the task at hand, see `Task.description`.
    """
    path = stem.with_suffix(".json")
    if not path.is_file():
        return []
    about = json.loads(path.read_text())
    tasks = about.pop("tasks")
    same = (task for task in tasks if _measures_the_same(task["description"], json.loads(json.dumps(description))))
    return [_row(name, entry, about) for task in same for name, entry in task["methods"].items()]


def _measures_the_same(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Equal but for the rounding of the sum over the weights, which differs between machines."""
    weights = [d.get("weights", 0.0) for d in (there, here)]
    rest = [{key: value for key, value in d.items() if key != "weights"} for d in (there, here)]
    return rest[0] == rest[1] and math.isclose(*weights, rel_tol=1e-9)


def _row(name: str, entry: Mapping[str, Any], about: Mapping[str, Any]) -> MethodRow:
    columns = tuple(Column(metric, number["better"], _estimate(number)) for metric, number in entry["metrics"].items())
    made = entry.get("about", about)
    return MethodRow(name, columns, entry["seconds_per_example"], entry["examples"], entry.get("error", ""), made)


def _estimate(number: Mapping[str, Any]) -> Estimate:
    value, low, high = (math.nan if number[key] is None else number[key] for key in ("value", "low", "high"))
    return Estimate(value, low, high, number["examples"], number["undefined"])


def _earlier_runs(result: TaskResult) -> list[str]:
    """Which rows other runs measured."""
    runs: dict[str, list[MethodRow]] = {}
    for row in result.rows:
        if row.about is not None:
            runs.setdefault(described(row.about), []).append(row)
    lines = []
    for how, rows in runs.items():
        lines += ["", f"Measured earlier: {', '.join(row.method for row in rows)}:", "", how]
    return lines


def write(results: Sequence[TaskResult], circumstances: Mapping[str, Any], stem: Path, title: str) -> None:
    """Writes `<stem>.md` and `<stem>.json`, both or none; the folder is made if missing."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_texts(
        {
            stem.with_suffix(".json"): json.dumps(as_json(results, circumstances), indent=1) + "\n",
            stem.with_suffix(".md"): as_markdown(results, circumstances, title),
        }
    )


def _table(result: TaskResult) -> list[str]:
    heads = next((row.columns for row in result.rows if row.columns), ())
    counts = sorted({row.examples for row in result.rows if not row.error})
    lines = []
    if counts:
        examples = " to ".join(str(count) for count in sorted({counts[0], counts[-1]}))
        lines += [f"{examples} examples.", ""]
    if result.skipped:
        named = "; ".join(result.skipped[:NAMED_SKIPS])
        more = f" and {len(result.skipped) - NAMED_SKIPS} more" if len(result.skipped) > NAMED_SKIPS else ""
        lines += [f"{len(result.skipped)} examples skipped: {named}{more}.", ""]
    # A reference such as the chance level is the same in every row: it stands below the table.
    shown = [i for i, column in enumerate(heads) if column.better]
    # Slow methods may have been measured on fewer examples.
    numbers = len(counts) > 1
    titles = ["method", *(heads[i].name + ARROWS[heads[i].better] for i in shown), "s", *["examples"] * numbers]
    lines += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    best = {i: _best([row.columns[i] for row in result.rows if row.columns]) for i in shown}
    for row in result.rows:
        if row.error:
            continue
        cells = [_cell(row.columns[i], best[i]) for i in shown]
        end = [f"{row.seconds:.3g}", *[str(row.examples)] * numbers]
        lines.append("| " + " | ".join([row.method, *cells, *end]) + " |")
    references = [f"{column.name} {_number(column.estimate.value)}" for column in heads if not column.better]
    if references:
        lines += ["", "Reference: " + ", ".join(references) + "."]
    refused = [f"{row.method}: {row.error}" for row in result.rows if row.error]
    if refused:
        lines += ["", "Not applicable:", "", *(f"- {line}" for line in refused)]
    undefined = max((column.estimate.skipped for row in result.rows for column in row.columns), default=0)
    if undefined:
        lines += ["", f"Up to {undefined} examples have no object or rationale and are left out of the columns on it."]
    return lines


def _best(columns: Sequence[Column]) -> float:
    values = [column.estimate.value for column in columns if not math.isnan(column.estimate.value)]
    if not values:
        return math.nan
    return min(values) if columns[0].better == "lower" else max(values)


def _cell(column: Column, best: float) -> str:
    estimate = column.estimate
    value = _number(estimate.value)
    if estimate.value == best:
        value = f"**{value}**"
    if math.isnan(estimate.low):
        return value
    return f"{value} <sub>{_number(estimate.low)}–{_number(estimate.high)}</sub>"


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def _task_json(result: TaskResult) -> dict[str, Any]:
    methods = {}
    for row in result.rows:
        metrics = {
            column.name: {
                "value": _finite(column.estimate.value),
                "low": _finite(column.estimate.low),
                "high": _finite(column.estimate.high),
                "examples": column.estimate.count,
                "undefined": column.estimate.skipped,
                "better": column.better,
            }
            for column in row.columns
        }
        entry: dict[str, Any] = {"metrics": metrics, "seconds_per_example": row.seconds, "examples": row.examples}
        if row.error:
            entry["error"] = row.error
        if row.about is not None:
            entry["about"] = dict(row.about)
        methods[row.method] = entry
    return {
        "task": result.task,
        "title": result.title,
        "description": json.loads(json.dumps(result.description)),
        "skipped": list(result.skipped),
        "methods": methods,
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
