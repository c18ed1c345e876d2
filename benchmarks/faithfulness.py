"""Faithfulness tables: every method on every model and data set, to `docs/results/faithfulness-<task>.md` and `.json`.

    python -m benchmarks.faithfulness                      # everything that the data at hand allows
    python -m benchmarks.faithfulness vit-imagenet swin    # some tasks
    python -m benchmarks.faithfulness --extend             # only the rows that the tables do not have yet
    python -m benchmarks.faithfulness --smoke              # two examples, three methods: does it run?

Data are looked for in the folder of the environment variable CTA_DATA (default ../shared/data). An interrupted run goes
on where it stopped (`--work`).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.faithfulness_tasks import TASKS, Options
from captum_transformer_attr.cli.progress import progress_bar
from captum_transformer_attr.comparison import Method, resolve
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.evaluation import (
    CENTER,
    RANDOM,
    MethodRow,
    Task,
    TaskResult,
    center_method,
    circumstances,
    description_of,
    earlier_rows,
    evaluate,
    random_method,
    write,
)
from captum_transformer_attr.output_files import check_writable

OURS = (
    "TransformerRelevance",
    "AttentionRelevance",
    "FullGradPlus",
    "ConsensusRelevance",
    "AttentionRollout",
    "RawAttention",
    "TransformerLRP:rules=attnlrp",
    "TransformerLRP:rules=libra",
    "TokenStatisticsRelevance",
    "PartialLRP",
    "AttCAT",
    "TokenTM",
    "TransformerLRP",
    "TransformerLRP:rules=cp",
    "RelevanceRollout",
    "AttentionGradCam",
    "LeGrad",
)
FAST_PEERS = ("InputXGradient", "LayerGradCam")
SLOW_PEERS = ("IntegratedGradients", "GradientShap", "Occlusion")
SLOWEST_PEERS = ("IntegratedGradients:n_steps=20", "GradientShap:n_samples=10", "Occlusion")
SIDES = tuple(f"TokenStatisticsRelevance:side={side}" for side in ("none", "query", "row"))
STATISTICS = (
    "TokenStatisticsRelevance",
    *SIDES,
    *(
        f"TokenStatisticsRelevance:side={side}:{option}"
        for side in ("none", "key")
        for option in ("start=gradient_x_activation", "merging=activation")
    ),
)
IMAGE = (RANDOM, CENTER, *FAST_PEERS, *OURS)
METHODS = {
    "statistics": (
        *STATISTICS,
        "TransformerRelevance",
        "AttentionRollout",
        "RawAttention",
        "LayerGradCam",
        "InputXGradient",
        RANDOM,
        CENTER,
    ),
    "image": (*IMAGE, "TransformerRelevance:start_layer=1", *SIDES, *SLOWEST_PEERS),
    "text": (*OURS, "InputXGradient", *SLOW_PEERS, RANDOM),
    "question": (*OURS, "InputXGradient", *SLOW_PEERS, RANDOM),
    "reviews": (*OURS, *FAST_PEERS, *SLOWEST_PEERS, RANDOM),
    "fast": (*OURS, *FAST_PEERS, RANDOM),
}
SMOKE_METHODS = ("TransformerRelevance", "InputXGradient", RANDOM)
CONTROLS = {RANDOM: random_method, CENTER: center_method}

console = Console(stderr=True)


def methods_of(names: tuple[str, ...]) -> list[Method]:
    """Methods by name, the two controls included."""
    return resolve([CONTROLS[name]() if name in CONTROLS else name for name in names])


def run_task(
    task: Task,
    kind: str,
    methods: tuple[str, ...],
    batch_size: int,
    work: Path | None,
    precision: torch.dtype | None = None,
    slow_count: int | None = None,
    there: Sequence[MethodRow] = (),
) -> TaskResult:
    """One table, with a progress bar over all methods and examples.

    Methods of `SLOW_PEERS` are measured on `slow_count` examples, spread over the others'. Rows that are there already
    stay, unless `methods` names them.
    """
    wanted = {methods_of((spec,))[0].name: spec for spec in methods or METHODS[kind]}
    rows = {row.method: row for row in there}
    todo = [spec for name, spec in wanted.items() if methods or name not in rows]
    slow = [spec for spec in todo if slow_count and spec in (*SLOW_PEERS, *SLOWEST_PEERS)]
    everything = task.indices
    result = TaskResult(task.name, task.title, (), (), {})
    few = everything[:: math.ceil(len(everything) / slow_count)] if slow_count else []
    with progress_bar() as bar:
        for specs, indices in (([spec for spec in todo if spec not in slow], everything), (slow, few)):
            if not specs:
                continue
            chosen, task.indices = methods_of(tuple(specs)), list(indices)
            advance = _advance(bar, task.name, len(chosen), len(indices))
            result = evaluate(task, chosen, batch_size=batch_size, folder=work, advance=advance, precision=precision)
            rows |= {row.method: row for row in result.rows}
    task.indices = everything
    usual = [method.name for method in methods_of(METHODS[kind])] if there else []
    order = dict.fromkeys([*(name for name in usual if name in rows), *rows])
    return replace(result, rows=tuple(rows[name] for name in order), description=description_of(task, precision))


def _advance(bar: Progress, name: str, methods: int, examples: int):  # noqa: ANN202
    line = bar.add_task(name, total=methods * examples)
    finished: dict[str, int] = {}

    def advance(method: str, done: int, total: int) -> None:
        finished[method] = done
        bar.update(line, completed=sum(finished.values()), description=f"{name}: {method}")

    return advance


def main(
    tasks: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(TASKS)}; all by default.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Methods instead of the task's own.")] = None,
    count: Annotated[int | None, typer.Option(help="Examples per task instead of the task's own number.")] = None,
    half: Annotated[str, typer.Option(help="all, or the even or odd half of the examples.")] = "all",
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    output: Annotated[Path, typer.Option(help="Folder of the tables.")] = Path("docs/results"),
    prefix: Annotated[str, typer.Option(help="Of the files' names.")] = "faithfulness",
    work: Annotated[Path, typer.Option(help="Folder that keeps finished work.")] = Path("build/faithfulness"),
    threads: Annotated[int | None, typer.Option(help="Of torch on the CPU.")] = None,
    device: Annotated[str, typer.Option(help="Where the models run: cpu, cuda, cuda:1, ...")] = "cpu",
    precision: Annotated[
        str, typer.Option(help="bfloat16: altered inputs are asked about under autocast; attributions never are.")
    ] = "float32",
    slow_count: Annotated[
        int | None, typer.Option(help=f"Examples for {', '.join(name.partition(':')[0] for name in SLOW_PEERS)}.")
    ] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Keep the rows of tables that measured the same; measure the missing ones.")
    ] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Two examples and three methods per task.")] = False,
) -> None:
    """Measure and write the tables."""
    if half not in ("all", "even", "odd"):
        raise typer.BadParameter(f"--half must be all, even or odd, not {half}")
    if precision not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"--precision must be float32 or bfloat16, not {precision}")
    asked = None if precision == "float32" else torch.bfloat16
    unknown = [name for name in tasks or () if name not in TASKS]
    if unknown:
        raise typer.BadParameter(f"no task {unknown[0]}; tasks: {', '.join(TASKS)}")
    try:  # before the work, which may take hours
        methods_of(tuple(method or ()) or (RANDOM,))
        output.mkdir(parents=True, exist_ok=True)
        check_writable(output / f"{prefix}-table.json")
    except InputError as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        raise typer.BadParameter(f"--output {output} cannot be written: {error.strerror or error}") from None
    if threads:
        torch.set_num_threads(threads)
    data = Path(os.environ.get("CTA_DATA") or "../shared/data")
    options = Options(data, 2 if smoke else count, half, 64 if smoke else None)
    methods = tuple(method or (SMOKE_METHODS if smoke else ()))
    for name in tasks or TASKS:
        missing = [folder for folder in TASKS[name].needs if not (data / folder).is_dir()]
        if missing:
            console.print(f"{name}: skipped, {data / missing[0]} is not there (set CTA_DATA)")
            continue
        try:
            task = TASKS[name].build(options)
        except FileNotFoundError as error:
            console.print(f"{name}: skipped, {error}")
            continue
        task.model.to(device)
        start, stem = time.perf_counter(), output / f"{prefix}-{name}"
        there = earlier_rows(stem, description_of(task, asked)) if extend else []
        if extend and not there:
            console.print(f"{name}: no table of the same task at {stem}.json to extend: every row is measured")
        result = run_task(
            task, TASKS[name].kind, methods, batch_size, None if smoke else work, asked, slow_count, there
        )
        write([result], circumstances(device), stem, f"Faithfulness: {result.title}")
        console.print(f"{name}: {len(result.rows)} methods in {time.perf_counter() - start:.0f} s, {stem}.md")


if __name__ == "__main__":
    typer.run(main)
