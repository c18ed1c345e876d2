"""Time of every method in multiples of the plain forward of the same model, in the same run.

    python -m benchmarks.speed                                # every case, to docs/results/speed.md and .json
    python -m benchmarks.speed "ViT-B batch 8" --repeat 5     # some cases
    python -m benchmarks.speed --smoke                        # the smallest case, once

Repetitions are interleaved (forward, method 1, method 2, ..., forward, ...), after one warm-up; medians and the spread
are reported. A method whose warm-up takes longer than `--once` is counted with that one run; Integrated Gradients is
left out where it would take longer than `--longest`. With CTA_LXT_PYTHON, a Python that has `lxt` (see peers_lxt.py),
its AttnLRP is timed on BERT and Llama, against the forward of its own process.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.cases import (
    CASES,
    DEVICE,
    STEPS,
    earlier,
    in_order,
    known_cases,
    made_by,
    ours,
    peers,
    write_results,
)
from captum_transformer_attr.evaluation.machine import circumstances

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def seconds(run: Any) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    name: str, repeat: int, with_peers: bool, only: str, longest: float, once: float, progress: Progress
) -> dict[str, Any]:
    """One case: seconds of every repetition, per method."""
    case = CASES[name]()
    methods = ours(case) | (peers(case) if with_peers else {})
    methods = {m: run for m, run in methods.items() if only in m}
    times: dict[str, list[float]] = {"forward": [], **{m: [] for m in methods}}
    single: set[str] = set()
    case.forward()  # a GPU's first call loads its kernels
    ig_seconds = 3 * STEPS * seconds(case.forward)
    task = progress.add_task(name, total=(repeat + 1) * (len(methods) + 1))
    failed: dict[str, str] = {}
    for repetition in range(repeat + 1):
        for method, run in {"forward": case.forward, **methods}.items():
            progress.advance(task)
            if method in failed or (repetition and method in single):
                continue
            if method.startswith("IntegratedGradients") and ig_seconds > longest:
                failed[method] = f"left out: about {ig_seconds:.0f} s"
                continue
            try:
                elapsed = seconds(run)
            except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
                failed[method] = f"fails: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
                continue
            if method != "forward" and not repetition and elapsed > once:
                single.add(method)
            if repetition or method in single:
                times[method].append(elapsed)
    result = {"case": name, "items": case.items, "unit": case.unit, "seconds": times, "failed": failed}
    if with_peers and os.environ.get("CTA_LXT_PYTHON") and only in "lxt AttnLRP":
        result["lxt"] = lxt_multiple(name, repeat)
    return result


def lxt_multiple(name: str, repeat: int) -> float | None:
    """AttnLRP of ``lxt`` in a process of its own, as a multiple of the forward there; None where lxt has no patch."""
    family, tokens = name.split("-")[0].lower(), name.split()[1]
    if family not in ("bert", "llama") or "bf16" in name:
        return None
    worker = Path(__file__).parent / "speed_lxt_worker.py"
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [os.environ["CTA_LXT_PYTHON"], str(worker), family, tokens, str(repeat), threads],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"lxt on {name}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.strip().splitlines()[-1])


def rows(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """method, multiple of the forward, spread, items per second."""
    forward = statistics.median(result["seconds"]["forward"])
    found = []
    for method, times in result["seconds"].items():
        if method in result["failed"]:
            found.append((method, "", result["failed"][method], ""))
        elif times:
            low, middle, high = min(times), statistics.median(times), max(times)
            spread = f"{low / forward:.2f} - {high / forward:.2f}" if len(times) > 1 else "one run"
            found.append(
                (method, f"{middle / forward:.2f}", spread, f"{result['items'] / middle:.3g} {result['unit']}/s")
            )
    if result.get("lxt"):
        found.append(("lxt AttnLRP", f"{result['lxt']:.2f}", "median, own process", ""))
    return found


def markdown(results: list[dict[str, Any]]) -> str:
    lines = [
        "# Speed",
        "",
        "Multiples of the plain forward of the same model in the same run (median, min - max); random weights.",
        "",
    ]
    for result in in_order(results):
        lines += [f"## {result['case']}", "", "| method | × forward | spread | rate |", "| --- | ---: | ---: | ---: |"]
        lines += [f"| {' | '.join(row)} |" for row in rows(result)] + [""]
    return "\n".join([*lines, *made_by(results)])


def main(
    cases: Annotated[list[str] | None, typer.Argument(help="names of cases; default all but 'tiny'")] = None,
    repeat: Annotated[int, typer.Option(help="counted repetitions", min=1)] = 3,
    peers: Annotated[bool, typer.Option(help="also time Captum's methods")] = True,
    only: Annotated[str, typer.Option(help="only methods whose name contains this")] = "",
    smoke: Annotated[bool, typer.Option(help="the smallest case, once, without writing results")] = False,
    output: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
    longest: Annotated[float, typer.Option(help="seconds above which Integrated Gradients is left out")] = 240.0,
    once: Annotated[float, typer.Option(help="seconds of a warm-up above which it is the only run")] = 60.0,
    threads: Annotated[int, typer.Option(help="CPU threads, 0 for torch's default")] = 0,
    precision: Annotated[
        str, typer.Option(help="of float32 products on a GPU, see torch.set_float32_matmul_precision")
    ] = "highest",
) -> None:
    """Time every method on every case."""
    torch.set_float32_matmul_precision(precision)
    if threads:
        torch.set_num_threads(threads)
    names = ["tiny"] if smoke else known_cases(cases or [n for n in CASES if n != "tiny"])
    console, results = Console(), [] if smoke else earlier(output / "speed", names)
    about = {**circumstances(DEVICE), "threads": torch.get_num_threads(), "repetitions": repeat}
    with Progress(console=console) as progress:
        for name in names:
            torch.manual_seed(0)
            results.append(
                {"about": about, **measure(name, 1 if smoke else repeat, peers, only, longest, once, progress)}
            )
            table = Table("method", "× forward", "spread", "rate", title=name)
            for row in rows(results[-1]):
                table.add_row(*row)
            progress.console.print(table)
            if not smoke:
                write_results(output / "speed", results, markdown(results))


if __name__ == "__main__":
    typer.run(main)
