"""MoRF and LeRF curves of the explained logit on a causal language model and a sentence classifier.

Tokens are truly removed, the most relevant first (MoRF: the logit should fall) or the least relevant first (LeRF: it
should stay). The first and the last token always stay: beginning of sequence or [CLS], and the token that asks for the
next one or [SEP].

    python -m benchmarks.language_models [--data ../shared/data] [--count 200] [--out docs/results/language_models.md]

A JSON file with every number is written beside the Markdown file.
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
from torch import Tensor, nn

import captum_transformer_attr as cta
from benchmarks.data_folder import data_folder
from captum_transformer_attr.datasets import SstRationales
from captum_transformer_attr.evaluation.language import sampled_prompts
from captum_transformer_attr.evaluation.machine import circumstances, described
from captum_transformer_attr.metrics.bootstrap import bootstrap
from captum_transformer_attr.output_files import check_writable, write_texts

FRACTIONS = tuple(i / 10 for i in range(1, 10))
ORDERS = ("MoRF", "LeRF")
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A model, its inputs in batches, and the logits that are explained:
    ``target(selected token or class) -> Captum target``."""

    name: str
    model: nn.Module
    batches: list[Inputs]
    logits: Callable[[nn.Module, Inputs], Tensor]
    target: Callable[[Tensor], Any]


def last_logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """Logits of the next token ``(N, V)``; prompts are not padded."""
    return model(**inputs, use_cache=False).logits[:, -1]


def class_logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """Logits of the classes ``(N, C)``."""
    return model(**inputs).logits


def stories(data: Path, count: int) -> Task:
    """Prompts of 40 tokens that the model wrote itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(data / "stories260k", dtype=torch.float32).eval()
    ids = sampled_prompts(model, count, 40)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(50)]
    return Task("stories260k", model, batches, last_logits, lambda chosen: [(-1, int(token)) for token in chosen])


def sentences(data: Path, count: int) -> Task:
    """SST sentences of at least eight word pieces."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = data / "minilm_sst2"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reader = SstRationales(data / "sst_rationales" / "sst_rationales.jsonl")
    texts = [" ".join(reader[i].words) for i in range(len(reader))]
    texts = [text for text in texts if len(tokenizer(text)["input_ids"]) >= 10][:count]
    batches = []
    for start in range(0, len(texts), 50):
        encoded = tokenizer(texts[start : start + 50], padding=True, return_tensors="pt")
        batches.append({"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]})
    return Task("minilm_sst2", model, batches, class_logits, lambda chosen: chosen)


TASKS = {"stories260k": stories, "minilm_sst2": sentences}


# ---------------------------------------------------------------------- methods
def ours(method: Any) -> Callable[[Task, Inputs, Tensor], Tensor]:
    """Scores of one of our classes."""

    def scores(task: Task, inputs: Inputs, chosen: Tensor) -> Tensor:
        given = {**inputs, "use_cache": False} if task.logits is last_logits else inputs
        result: Tensor = method(task.model).attribute_tokens(given, task.target(chosen))["input_ids"]
        return result

    return scores


def random_scores(task: Task, inputs: Inputs, chosen: Tensor) -> Tensor:
    """Uniform noise, other noise for other inputs."""
    ids = inputs["input_ids"]
    return torch.rand(ids.shape, generator=torch.Generator().manual_seed(int(ids.sum())))


def input_x_gradient(task: Task, inputs: Inputs, chosen: Tensor) -> Tensor:
    """Embedding times the logit's plain gradient, summed over channels."""
    embedding = task.model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()  # type: ignore[operator]
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    logits = task.logits(task.model, {"inputs_embeds": embedding, **rest})
    (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), embedding)
    return (embedding * gradient).sum(-1).detach()


METHODS: dict[str, Callable[[Task, Inputs, Tensor], Tensor]] = {
    "random": random_scores,
    "RawAttention": ours(cta.RawAttention),
    "AttentionRollout": ours(cta.AttentionRollout),
    "input × gradient": input_x_gradient,
    "AttentionGradCam": ours(lambda m: cta.AttentionGradCam(m, average="map")),
    "PartialLRP": ours(cta.PartialLRP),
    "AttentionRelevance": ours(cta.AttentionRelevance),
    "TransformerRelevance": ours(cta.TransformerRelevance),
    "AttCAT": ours(cta.AttCAT),
    "LeGrad": ours(cta.LeGrad),
    "TransformerLRP deep_taylor": ours(lambda m: cta.TransformerLRP(m, "deep_taylor")),
    "TransformerLRP cp": ours(lambda m: cta.TransformerLRP(m, "cp")),
    "TransformerLRP attnlrp": ours(lambda m: cta.TransformerLRP(m, "attnlrp")),
    "TransformerLRP libra": ours(lambda m: cta.TransformerLRP(m, "libra")),
    "FullGradPlus (libra)": ours(cta.FullGradPlus),
}


# ---------------------------------------------------------------------- curves
def shortened(inputs: Inputs, scores: Tensor, fraction: float, most_first: bool) -> Inputs:
    """The inputs without this fraction of their removable tokens; padded on the right where lengths differ."""
    kept = []
    for ids, mask, row in zip(inputs["input_ids"], inputs["attention_mask"], scores, strict=True):
        length = int(mask.sum())
        inner = row[1 : length - 1]
        order = inner.argsort(descending=most_first, stable=True) + 1
        gone = set(order[: round(fraction * len(inner))].tolist())
        kept.append(ids[[i for i in range(length) if i not in gone]])
    lengths = torch.tensor([len(row) for row in kept])
    ids = nn.utils.rnn.pad_sequence(kept, batch_first=True)
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


@torch.no_grad()
def changes(task: Task, inputs: Inputs, chosen: Tensor, scores: Tensor) -> Tensor:
    """Change of the chosen logit, ``(N, orders, fractions)``."""
    before = task.logits(task.model, inputs).gather(1, chosen[:, None])
    curves = []
    for order in ORDERS:
        parts = [shortened(inputs, scores, fraction, order == "MoRF") for fraction in FRACTIONS]
        after = [task.logits(task.model, part).gather(1, chosen[:, None]) for part in parts]
        curves.append(torch.cat(after, 1) - before)
    return torch.stack(curves, 1)


def run(task: Task) -> dict[str, tuple[Tensor, float]]:
    """Every method's changes ``(N, orders, fractions)`` and seconds per example."""
    results = {}
    for name, method in METHODS.items():
        curves, seconds = [], 0.0
        for inputs in task.batches:
            with torch.no_grad():
                chosen = task.logits(task.model, inputs).argmax(1)
            start = time.perf_counter()
            scores = method(task, inputs, chosen)
            seconds += time.perf_counter() - start
            curves.append(changes(task, inputs, chosen, scores))
        together = torch.cat(curves)
        results[name] = (together, seconds / len(together))
        print(task.name, name, [f"{v:.3f}" for v in together.mean((0, 2)).tolist()], flush=True)
    return results


def table(name: str, results: dict[str, tuple[Tensor, float]]) -> str:
    """One task as Markdown: mean change over the curve, and the area between LeRF and MoRF with its 95 % interval."""
    count = len(next(iter(results.values()))[0])
    lines = [
        f"## {name}, {count} examples",
        "",
        "| method | MoRF ↓ | LeRF ↑ | LeRF − MoRF ↑ (95 %) | MoRF, 10 % | MoRF, 50 % | LeRF, 50 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, (curves, _) in sorted(results.items(), key=lambda item: -float(gap(item[1][0]).mean())):
        morf, lerf = curves.mean((0, 2)).tolist()
        (area,) = bootstrap(gap(curves))
        points = curves.mean(0)
        cells = [f"{morf:.2f}", f"{lerf:.2f}", f"{area.value:.2f} [{area.low:.2f}, {area.high:.2f}]"]
        cells += [f"{points[0, 0]:.2f}", f"{points[0, 4]:.2f}", f"{points[1, 4]:.2f}"]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def gap(curves: Tensor) -> Tensor:
    """Area between the curves per example."""
    return (curves[:, 1] - curves[:, 0]).mean(1)


def numbers(results: dict[str, tuple[Tensor, float]]) -> dict[str, Any]:
    """One task for JSON: the mean curves, the area between them with its interval, seconds."""
    found = {}
    for method, (curves, seconds) in results.items():
        (area,) = bootstrap(gap(curves))
        mean = dict(zip(ORDERS, curves.mean(0).tolist(), strict=True))
        interval = {"value": area.value, "low": area.low, "high": area.high}
        found[method] = {**mean, "LeRF - MoRF": interval, "seconds_per_example": seconds, "examples": len(curves)}
    return found


def main(
    data: Annotated[Path | None, typer.Option(help="Folder of models and data; default CTA_DATA.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts and sentences.")] = 200,
    task: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(TASKS)}; several allowed.")] = None,
    out: Annotated[Path | None, typer.Option(help="Markdown file to write; the JSON file stands beside it.")] = None,
) -> None:
    """Measure, print, and write the tables."""
    unknown = set(task or ()) - set(TASKS)
    if unknown:
        raise typer.BadParameter(f"no task {min(unknown)!r}; known: {', '.join(TASKS)}")
    if out:
        check_writable(out)
    torch.set_num_threads(1)
    how = circumstances()
    parts = [
        "# Removing tokens from language models",
        "",
        described(how),
        "",
        "Mean change of the explained logit (the model's own choice) while 10, 20, …, 90 % of the tokens are removed, "
        "the most relevant first (MoRF) or the least relevant first (LeRF).",
        "",
    ]
    tasks = {}
    for name in task or TASKS:
        results = run(TASKS[name](data or data_folder(), count))
        parts.append(table(name, results))
        tasks[name] = numbers(results)
    text = "\n".join(parts)
    print(text)
    if out:
        page = json.dumps({**how, "fractions": FRACTIONS, "tasks": tasks}, indent=1) + "\n"
        write_texts({out.with_suffix(".json"): page, out: text})


if __name__ == "__main__":
    typer.run(main)
