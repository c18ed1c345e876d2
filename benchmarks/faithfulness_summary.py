"""The page over all faithfulness tables, with its figure, from the JSON files beside it.

python -m benchmarks.faithfulness_summary    # docs/results/faithfulness.md and faithfulness.png
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib

matplotlib.use("Agg")

import typer
from matplotlib import pyplot

from captum_transformer_attr.comparison import method_names
from captum_transformer_attr.comparison.captum_methods import CAPTUM_METHODS
from captum_transformer_attr.output_files import write_texts

KEY_COLUMNS = (
    "positive, predicted",
    "negative, predicted",
    "positive, label",
    "negative, label",
    "squares positive, predicted",
    "squares negative, predicted",
    "image positive, predicted",
    "image negative, predicted",
    "question positive, predicted",
    "question negative, predicted",
    "masked positive, predicted",
    "masked negative, predicted",
    "AUPRC",
    "pointing",
    "mass in mask",
    "AP",
    "class separation",
)
"""Columns that the comparisons look at, where a table has them."""
SHOWN = (*KEY_COLUMNS, "infidelity", "max. sensitivity")
"""Columns of the short tables."""
CHAIN = ("TransformerRelevance", "AttentionRollout", "RawAttention", "LayerGradCam")
"""The order of the papers' tables, best first."""
CONTROLS = ("Random", "InputXGradient")
TITLE = "Faithfulness: all tables"
NOTES = Path(__file__).with_name("faithfulness_notes.md")
"""What a person concluded from the tables; goes on top of the page."""

Metric = dict[str, Any]


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Every table by its file's short name, with the circumstances of its making."""
    tables = {}
    for path in sorted(folder.glob("faithfulness-*.json")):
        content = json.loads(path.read_text())
        (task,) = content.pop("tasks")
        tables[path.stem.removeprefix("faithfulness-")] = {**task, "about": content}
    return tables


def ours() -> set[str]:
    """Names of this package's classes."""
    return {name for name in method_names() if name not in CAPTUM_METHODS}


def is_worse(first: Metric, second: Metric) -> Literal["", "worse", "clearly worse"]:
    """How a method's number compares with another's; clearly where the intervals are apart."""
    sign = 1 if first["better"] == "higher" else -1
    if first["value"] is None or second["value"] is None or sign * first["value"] >= sign * second["value"]:
        return ""
    ends = ("high", "low") if sign == 1 else ("low", "high")
    if first[ends[0]] is None or second[ends[1]] is None:
        return "worse"
    return "clearly worse" if sign * first[ends[0]] < sign * second[ends[1]] else "worse"


def columns_of(task: dict[str, Any], among: Sequence[str] = KEY_COLUMNS) -> list[str]:
    """Those of some columns that a table has."""
    first = next((m["metrics"] for m in task["methods"].values() if m["metrics"]), {})
    return [column for column in among if column in first]


def number(value: float | None) -> str:
    """Short form."""
    return "–" if value is None else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def key_table(task: dict[str, Any]) -> list[str]:
    """Methods by the columns shown; the best is bold."""
    columns = columns_of(task, SHOWN)
    rows = {name: entry["metrics"] for name, entry in task["methods"].items() if entry["metrics"]}
    arrows = {"lower": "↓", "higher": "↑"}
    heads = [f"{column} {arrows[next(iter(rows.values()))[column]['better']]}" for column in columns]
    lines = ["| method | " + " | ".join(heads) + " | examples |", "|" + "---|" * (len(columns) + 2)]
    best = {}
    for column in columns:
        values = [m[column]["value"] for m in rows.values() if m[column]["value"] is not None]
        lower = next(iter(rows.values()))[column]["better"] == "lower"
        best[column] = (min if lower else max)(values, default=None)
    for name, metrics in rows.items():
        cells = []
        for column in columns:
            value = metrics[column]["value"]
            cells.append(f"**{number(value)}**" if value is not None and value == best[column] else number(value))
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {task['methods'][name]['examples']} |")
    return lines


def ordering(tables: dict[str, dict[str, Any]]) -> list[str]:
    """Where the papers' order holds."""
    lines = ["| table | column | " + " | ".join(CHAIN) + " | |", "|" + "---|" * (len(CHAIN) + 3)]
    for name, task in tables.items():
        for column in columns_of(task):
            rows = {m: e["metrics"][column] for m, e in task["methods"].items() if e["metrics"]}
            chain = [method for method in CHAIN if method in rows and rows[method]["value"] is not None]
            if len(chain) < 3 or chain[0] != CHAIN[0] or column == "class separation":
                continue
            broken = [
                f"{a} {is_worse(rows[a], rows[b])} than {b}"
                for a, b in zip(chain, chain[1:], strict=False)
                if is_worse(rows[a], rows[b])
            ]
            values = [number(rows[m]["value"]) if m in rows else "" for m in CHAIN]
            arrow = "↓" if rows[chain[0]]["better"] == "lower" else "↑"
            verdict = "; ".join(broken) or "as in the papers"
            lines.append(f"| {name} | {column} {arrow} | " + " | ".join(values) + f" | {verdict} |")
    return lines


def behind_controls(tables: dict[str, dict[str, Any]]) -> list[str]:
    """Our methods whose interval lies wholly on the wrong side of a control's."""
    lines = []
    for name, task in tables.items():
        for column in columns_of(task):
            rows = {m: e["metrics"][column] for m, e in task["methods"].items() if e["metrics"]}
            for control in CONTROLS:
                if control not in rows or (column == "class separation" and control != "Random"):
                    continue
                behind = [
                    method
                    for method in rows
                    if method.partition(" ")[0] in ours() and is_worse(rows[method], rows[control]) == "clearly worse"
                ]
                if behind:
                    lines.append(f"- {name}, {column}: clearly behind {control}: {', '.join(behind)}.")
    return lines


def figure(task: dict[str, Any], path: Path) -> None:
    """Positive against negative perturbation as a PNG: a point per method, circles are ours.

    The legend has the widest gap between the two first.
    """
    fig, axes = pyplot.subplots(figsize=(8.6, 4.4), constrained_layout=True)
    measured = [(name, entry["metrics"]) for name, entry in task["methods"].items() if entry["metrics"]]
    measured = [(n, m) for n, m in measured if "(" not in n or "(rules=" in n]  # no variants of a method that is shown
    measured.sort(key=lambda row: row[1]["negative, predicted"]["value"] - row[1]["positive, predicted"]["value"])
    colors = pyplot.get_cmap("tab20").colors
    used = {"o": 0, "s": 0}
    for name, metrics in reversed(measured):
        marker = "o" if name.partition(" ")[0] in ours() else "s"
        used[marker] += 1
        x, y = metrics["positive, predicted"], metrics["negative, predicted"]
        axes.errorbar(
            x["value"],
            y["value"],
            xerr=[[x["value"] - x["low"]], [x["high"] - x["value"]]],
            yerr=[[y["value"] - y["low"]], [y["high"] - y["value"]]],
            fmt=marker,
            color=colors[used[marker] % 20],
            elinewidth=0.5,
            markersize=6,
            label=name.replace("TransformerLRP (rules=", "LRP ("),
        )
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    axes.set_xlabel("positive perturbation AUC (most relevant removed first; lower is better)")
    axes.set_ylabel("negative perturbation AUC (higher is better)")
    examples = max(entry["examples"] for entry in task["methods"].values())
    axes.set_title(f"{task['title']}, {examples} images, 95 % intervals", fontsize=10)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.png")
    fig.savefig(temporary, dpi=100)
    temporary.replace(path)
    pyplot.close(fig)


def page(tables: dict[str, dict[str, Any]], picture: str) -> str:
    """The whole page."""
    lines = [f"# {TITLE}", "", "Made by `python -m benchmarks.faithfulness_summary` from the tables it links to."]
    if NOTES.is_file():
        lines += ["", NOTES.read_text().strip()]
    if picture:
        lines += ["", f"![Positive against negative perturbation of every method on ViT-Tiny]({picture})"]
    lines += ["", "## Does the papers' order hold?", "", *ordering(tables)]
    behind = behind_controls(tables) or ["None."]
    lines += ["", "## Methods clearly behind a control", "", "Intervals that do not touch.", "", *behind]
    for name, task in tables.items():
        about = task["about"]
        lines += [
            "",
            f"## {task['title']}",
            "",
            f"[faithfulness-{name}.md](faithfulness-{name}.md): `{about['command']}`",
        ]
        lines += ["", *key_table(task)]
    return "\n".join(lines) + "\n"


def main(
    folder: Annotated[Path, typer.Argument(help="Of the JSON files.")] = Path("docs/results"),
    headline: Annotated[str, typer.Option(help="The table that the figure shows.")] = "vit-imagenet",
) -> None:
    """Write the page."""
    tables = load(folder)
    if not tables:
        raise typer.BadParameter(f"no faithfulness-*.json in {folder}; run python -m benchmarks.faithfulness first")
    picture = ""
    if headline in tables:
        figure(tables[headline], folder / "faithfulness.png")
        picture = "faithfulness.png"
    write_texts({folder / "faithfulness.md": page(tables, picture)})


if __name__ == "__main__":
    typer.run(main)
