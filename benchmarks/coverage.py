"""Coverage table: every architecture of timm and transformers, with random weights, in float64, on a batch of two.

    OMP_NUM_THREADS=1 python -m benchmarks.coverage  # what was not run yet, then docs/coverage.md
    OMP_NUM_THREADS=1 python -m benchmarks.coverage --sources timm --only "swin|levit" --again
    OMP_NUM_THREADS=1 python -m benchmarks.coverage --part 1/2 --no-write  # beside another process with --part 2/2

Nothing is downloaded. Results are kept in ``~/.cache/captum_transformer_attr/coverage-<source>.jsonl``, so an
interrupted run goes on where it stopped; ``--again`` runs the selected architectures anew, ``--retry`` those that were
not attributed, ``--stale`` those run with other engine files.

A source is a module ``coverage_<source>.py`` beside this file with a function ``cases()`` that yields
``(name, family, model, inputs, target)`` or ``(name, family, model, inputs, target, details)``:
``model()`` builds a float64 model in evaluation mode whose weights are all away from degenerate initial values,
``inputs()`` returns what ``attribute`` takes (a batch of two), ``target`` is Captum's, ``details`` is a dict of strings
for the table: ``parameters``, ``input``, ``for`` (architectures this one stands for), ``scope`` (why it is not counted
as softmax attention over tokens). ``outside()``, optional, yields ``(name, family, reason)`` for architectures that are
listed and not run. ``coverage_check.py`` runs one case; ``coverage_table.py`` writes the table.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import captum_transformer_attr
from benchmarks.coverage_check import Row, check
from benchmarks.coverage_table import digest_of, write_table
from captum_transformer_attr.methods.base import TransformerAttribution

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path.home() / ".cache" / "captum_transformer_attr"
MAIN = "TransformerRelevance"


def engine_version() -> str:
    """Digest of the files that decide a result."""
    package = Path(captum_transformer_attr.__file__).parent
    return digest_of({str(f.relative_to(package)): f.read_bytes() for f in package.rglob("*.py")})


def available_methods() -> list[str]:
    """The public attribution classes that need nothing but a model, the main one first."""
    found = [n for n in captum_transformer_attr.__all__ if is_method(getattr(captum_transformer_attr, n))]
    return sorted(found, key=lambda n: (n != MAIN, n))


def is_method(value: Any) -> bool:
    return (
        isinstance(value, type)
        and issubclass(value, TransformerAttribution)
        and not value.__name__.startswith(("Layer", "Neuron"))
    )


def load(source: str) -> dict[tuple[str, str], Row]:
    """Rows of earlier runs by (architecture, method); the latest wins."""
    file = CACHE / f"coverage-{source}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return {(row.name, row.method): row for row in rows}


def store(source: str, row: Row) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"coverage-{source}.jsonl").open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def main(
    sources: Annotated[str, typer.Option(help="which sources to run, separated by commas")] = "timm,transformers",
    only: Annotated[
        str, typer.Option(help="regular expression: run only architectures whose name or family it finds")
    ] = "",
    methods: Annotated[
        str, typer.Option(help="attribution classes, separated by commas; 'all' for every public one")
    ] = MAIN,
    again: Annotated[bool, typer.Option("--again", help="run although there is a result")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="run what was not attributed")] = False,
    stale: Annotated[bool, typer.Option("--stale", help="run what was run with other engine files")] = False,
    part: Annotated[str, typer.Option(help="'1/2', '2/2': a share of the work, for processes side by side")] = "1/1",
    table: Annotated[Path, typer.Option(help="where the table is written")] = ROOT / "docs" / "coverage.md",
    write: Annotated[bool, typer.Option("--write/--no-write", help="write the table at the end")] = True,
) -> None:
    """Run the architectures that have no result yet and write the table."""
    console = Console(stderr=True, width=200)
    warnings.filterwarnings("ignore")
    chosen = available_methods() if methods == "all" else methods.split(",")
    unknown = [m for m in chosen if m not in available_methods()]
    if unknown:
        raise typer.BadParameter(f"--methods: no class {unknown[0]}; there are {', '.join(available_methods())}")
    if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", part):
        raise typer.BadParameter(f"--part must be like 1/2, not {part}")
    share, shares = map(int, part.split("/"))
    engine = engine_version()
    pattern = re.compile(only)
    for source in sources.split(","):
        done = load(source)
        todo: list[tuple[Any, str]] = []
        # A share of all cases, not of what is left to do, which another process is changing.
        for case in itertools.islice(
            importlib.import_module(f"benchmarks.coverage_{source}").cases(), share - 1, None, shares
        ):
            if not (pattern.search(case[0]) or pattern.search(case[1])):
                continue
            for method in chosen:
                row = done.get((case[0], method))
                if row is None or again or (retry and row.outcome != "attributed") or (stale and row.engine != engine):
                    todo.append((case, method))
        run(console, source, todo, engine)
    if write:
        write_table(
            table,
            {
                source: (importlib.import_module(f"benchmarks.coverage_{source}"), load(source))
                for source in ("timm", "transformers")
            },
        )
        console.print(f"wrote {table}")


def run(console: Console, source: str, todo: list[tuple[Any, str]], engine: str) -> None:
    """Run the cases, one line each for what was not attributed."""
    columns = (
        TextColumn("{task.description:<60}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(source, total=len(todo))
        for case, method in todo:
            progress.update(task, description=f"{case[0]} · {method}")
            row = check(case, method, engine)
            store(source, row)
            if row.outcome != "attributed":
                progress.console.print(
                    f"{row.outcome}: {row.name} · {method}: {row.reason}", highlight=False, markup=False
                )
            progress.advance(task)
            gc.collect()


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
