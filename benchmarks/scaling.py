"""How time and memory grow with the number of tokens and with the batch, as a figure and JSON.

python -m benchmarks.scaling                # to docs/results/scaling.png and .json
python -m benchmarks.scaling --smoke
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress

from benchmarks.cases import DEVICE, Case, ours
from benchmarks.memory import measured_peak
from benchmarks.speed import seconds
from captum_transformer_attr.evaluation.machine import circumstances

RESULTS = Path(__file__).parent.parent / "docs" / "results"
METHODS = ("TransformerRelevance", "AttentionRelevance", "TransformerLRP attnlrp")
TOKENS = (128, 256, 512, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8, 16)


def llama(tokens: int, batch: int) -> Case:
    """A Llama-style model of 4 layers, width 256: small enough for every length, and all that grows is there."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1000,
        max_position_embeddings=8192,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().to(DEVICE)
    inputs = {"input_ids": torch.randint(0, 1000, (batch, tokens), device=DEVICE), "logits_to_keep": 1}
    return Case(model, inputs, (0, 1), batch * tokens, "tokens")


def one(tokens: int, batch: int, method: str, repeat: int) -> dict[str, float]:
    """Multiple of the forward, and MiB above the weights, in this process."""
    case = llama(tokens, batch)
    run = ours(case)[method]
    mib = measured_peak(run)
    pairs = [(seconds(case.forward), seconds(run)) for _ in range(repeat)]
    return {
        "tokens": tokens,
        "batch": batch,
        "forward_s": statistics.median(f for f, _ in pairs),
        "method_s": statistics.median(m for _, m in pairs),
        "mib": mib,
    }


def measured(tokens: int, batch: int, method: str, repeat: int) -> dict[str, float]:
    """One point: on the CPU in a process of its own, because freed memory stays resident."""
    if DEVICE.type == "cuda":
        one(tokens, batch, method, 1)  # warm-up
        return one(tokens, batch, method, repeat)
    return in_subprocess(tokens, batch, method, repeat)


def in_subprocess(tokens: int, batch: int, method: str, repeat: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scaling", "--point", f"{tokens},{batch},{method},{repeat}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise RuntimeError(f"{method} at {tokens} tokens, batch {batch}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def draw(curves: dict[str, dict[str, list[dict[str, float]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    for row, (over, label) in enumerate((("tokens", "tokens (batch 1)"), ("batch", "batch (256 tokens)"))):
        for method, points in curves[over].items():
            x = [p[over] for p in points]
            axes[row, 0].plot(x, [p["method_s"] / p["forward_s"] for p in points], marker="o", label=method)
            axes[row, 1].plot(x, [p["mib"] for p in points], marker="o", label=method)
        axes[row, 0].set(xlabel=label, ylabel="time, × plain forward", ylim=(0, None))
        axes[row, 1].set(xlabel=label, ylabel="peak memory above weights, MiB")
        axes[row, 1].set_yscale("log", base=2)
        for axis in axes[row]:
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(
    repeat: Annotated[int, typer.Option(help="counted repetitions", min=1)] = 3,
    point: Annotated[str, typer.Option(help="one measurement, printed as JSON", hidden=True)] = "",
    smoke: Annotated[bool, typer.Option(help="two points, without writing results")] = False,
    output: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Measure the curves."""
    if point:
        tokens, batch, method, times = point.split(",")
        print(json.dumps(one(int(tokens), int(batch), method, int(times))))
        return
    if smoke:
        print(in_subprocess(32, 1, METHODS[0], 1))
        return
    plans = {"tokens": [(t, 1) for t in TOKENS], "batch": [(256, b) for b in BATCHES]}
    curves: dict[str, dict[str, list[dict[str, float]]]] = {over: {m: [] for m in METHODS} for over in plans}
    with Progress() as progress:
        task = progress.add_task("scaling", total=sum(len(p) for p in plans.values()) * len(METHODS))
        for over, plan in plans.items():
            for tokens, batch in plan:
                for method in METHODS:
                    curves[over][method].append(measured(tokens, batch, method, repeat))
                    progress.advance(task)
    output.mkdir(parents=True, exist_ok=True)
    about = circumstances(DEVICE)
    (output / "scaling.json").write_text(json.dumps({"about": about, "curves": curves}, indent=1))
    draw(curves, output / "scaling.png")


if __name__ == "__main__":
    typer.run(main)
