"""Share of the audit in an attribution: processor time of the walk over the recorded graph, and of the whole call.

    python -m benchmarks.audit_cost                     # ViT-B, batch 1 and 8, to docs/results/audit_cost.md
    python -m benchmarks.audit_cost --smoke             # a tiny ViT, printed only

Also says what the checks of a first call cost: the plain forward that the recorded one is compared with, and one
example alone.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer

from captum_transformer_attr import TransformerRelevance
from captum_transformer_attr.evaluation.machine import circumstances, described
from captum_transformer_attr.output_files import write_texts
from captum_transformer_attr.recording.audit import audit
from captum_transformer_attr.recording.inputs import parse
from captum_transformer_attr.recording.session import recorded

RESULT = Path(__file__).parent.parent / "docs" / "results" / "audit_cost.md"


def processor_seconds(run: Callable[[], Any], repeat: int) -> float:
    """Median processor time of a run, after one warm-up; waiting for other processes does not count."""
    times = []
    for _ in range(repeat + 1):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


def measure(name: str, size: int, batch: int, repeat: int) -> dict[str, Any]:
    """Seconds of an attribution, of its audit, and of a first call."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    pixels = torch.randn(batch, 3, size, size)
    explainer = TransformerRelevance(model)
    whole = processor_seconds(lambda: explainer.attribute(pixels, target=1), repeat)
    # What was compared is remembered per model, so that a first call needs a model of its own.
    firsts = max(1, repeat // 2)
    fresh = iter([TransformerRelevance(copy.deepcopy(model)) for _ in range(firsts + 1)])
    first = processor_seconds(lambda: next(fresh).attribute(pixels, target=1), firsts)
    with recorded(model, parse(pixels)) as recording:
        selected = recording.select(1)
        walk = processor_seconds(lambda: audit(selected), 20)
        nodes = len(recording.nodes)
    return {"case": f"{name}, batch {batch}", "nodes": nodes, "attribution": whole, "audit": walk, "first": first}


def main(
    repeat: Annotated[int, typer.Option(help="timed runs per case")] = 5,
    smoke: Annotated[bool, typer.Option("--smoke", help="a tiny model once, nothing written")] = False,
) -> None:
    """Measure and write the table."""
    cases = (
        [("test_vit", 160, 1, 1)]
        if smoke
        else [("vit_base_patch16_224", 224, 1, repeat), ("vit_base_patch16_224", 224, 8, repeat)]
    )
    lines = [
        "# What the audit costs\n",
        "Processor time, medians. The audit walks the recorded graph of every call; a first call also runs the plain"
        " forward and two examples of the batch alone.\n",
        "| case | operations | attribution (s) | audit (ms) | share of an attribution | first call / later calls |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        row = measure(*case)
        lines.append(
            f"| {row['case']} | {row['nodes']} | {row['attribution']:.2f} | {1e3 * row['audit']:.2f} | "
            f"{100 * row['audit'] / row['attribution']:.2f} % | {row['first'] / row['attribution']:.2f} |"
        )
    text = "\n".join([*lines, "", described(circumstances()), ""])
    typer.echo(text)
    if not smoke:
        write_texts({RESULT: text})


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
