"""Peak memory above the weights, per method: CUDA's allocator, or on the CPU the resident peak of a process of its own.

python -m benchmarks.memory                              # to docs/results/memory.md and .json
python -m benchmarks.memory "Llama-125M 2048 tokens"     # one case; the others stay in the table
python -m benchmarks.memory --smoke
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.cases import (
    CASES,
    DEVICE,
    Case,
    Run,
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
DEFAULT = [n for n in CASES if n != "tiny" and "batch 32" not in n]
FORWARD = "forward"
HOW = {"cpu": "resident memory, one process per figure", "cuda": "CUDA's allocator, after a warm-up"}


def peak(case_name: str, method: str) -> float:
    """MiB above the weights, in this process: run once per process."""
    torch.manual_seed(0)
    case = CASES[case_name]()
    return measured_peak(case.forward if method == FORWARD else compared(case)[method])


def compared(case: Case) -> dict[str, Run]:
    """Methods by name; Integrated Gradients goes through its steps in batches, so that more steps need no more."""
    return ours(case) | peers(case, steps=8)


def measured_peak(run: Callable[[], Any]) -> float:
    """MiB that a run needs above what the process holds before it."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(entry: str) -> float:
    """Resident memory of this process in MiB (Linux): ``"VmRSS"`` now, ``"VmHWM"`` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(entry))


def figure(name: str, case: Case, method: str) -> dict[str, Any]:
    """One figure: CUDA's allocator is read in this process; resident memory that was freed stays, and wants another."""
    if DEVICE.type != "cuda":
        return in_subprocess(name, method)
    run = case.forward if method == FORWARD else compared(case)[method]
    try:
        run()  # workspaces of the libraries are allocated once and stay
        return {"mib": measured_peak(run)}
    except torch.cuda.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return {"failed": str(error).splitlines()[0][:120]}


def in_subprocess(case: str, method: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", case, "--one", method]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        return {
            "failed": done.stderr.strip().splitlines()[-1][:120]
            if done.stderr.strip()
            else f"exit status {done.returncode}"
        }
    return {"mib": float(done.stdout.strip().splitlines()[-1])}


def markdown(results: list[dict[str, Any]]) -> str:
    lines = ["# Memory", "", f"Peak above the weights and what was held before: {HOW[DEVICE.type]}.", ""]
    for result in in_order(results):
        lines += [
            f"## {result['case']}",
            "",
            f"| method | MiB | KiB per {result['unit'][:-1]} |",
            "| --- | ---: | ---: |",
        ]
        for method, found in result["methods"].items():
            if "mib" in found:
                lines.append(f"| {method} | {found['mib']:.0f} | {found['mib'] * 1024 / result['items']:.1f} |")
            else:
                lines.append(f"| {method} | fails | {found['failed']} |")
        lines.append("")
    return "\n".join([*lines, *made_by(results)])


def main(
    cases: Annotated[list[str] | None, typer.Argument(help="names of cases")] = None,
    only: Annotated[str, typer.Option(help="only methods whose name contains this")] = "",
    one: Annotated[str, typer.Option(help="print the peak of this one method and stop", hidden=True)] = "",
    smoke: Annotated[bool, typer.Option(help="the smallest case, two figures, without writing results")] = False,
    output: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Measure every method on every case."""
    if one:
        print(peak((cases or ["tiny"])[0], one))
        return
    names = ["tiny"] if smoke else known_cases(cases or DEFAULT)
    about = circumstances(DEVICE)
    results = [] if smoke else earlier(output / "memory", names)
    console = Console()
    with Progress(console=console) as progress:
        for name in names:
            case = CASES[name]()
            methods = [FORWARD, *(m for m in compared(case) if only in m)]
            if smoke:
                methods = [FORWARD, "TransformerRelevance"]
            found = {}
            for method in progress.track(methods, description=name):
                found[method] = figure(name, case, method)
                progress.console.print(f"{name} · {method}: {found[method]}")
            results.append({"about": about, "case": name, "items": case.items, "unit": case.unit, "methods": found})
            if not smoke:
                write_results(output / "memory", results, markdown(results))


if __name__ == "__main__":
    typer.run(main)
