"""Does relevance add up, what do parameters take, and how far does the precision of a model carry? On trained models.

    python -m benchmarks.completeness [--data ../shared/data] [--count 8] [--out docs/results/completeness.md]

Completeness is measured in float64: the explained logit minus everything that arrived, at inputs, biases, norm shifts,
positions and class tokens. Lower precisions are compared with it, on the same rounded and on the original weights. What
TF32 would do, which the package never uses, is seen with products whose factors are rounded to its ten bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import captum_transformer_attr as cta
from benchmarks.data_folder import data_folder
from benchmarks.language_models import sentences, stories
from captum_transformer_attr.comparison.scores import rank_correlation
from captum_transformer_attr.datasets import LabelledImages
from captum_transformer_attr.evaluation.machine import circumstances, described
from captum_transformer_attr.loading import PreprocessingOptions, load_model
from captum_transformer_attr.output_files import check_writable, write_texts
from captum_transformer_attr.recording.outputs import unwrap

RULES = ("cp", "libra", "attnlrp", "deep_taylor")
CONSERVING = ("cp", "libra", "deep_taylor")
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
Make = Callable[[nn.Module], Any]
METHODS: dict[str, Make] = {
    **{f"TransformerLRP {rules}": (lambda model, rules=rules: cta.TransformerLRP(model, rules)) for rules in RULES},  # type: ignore[misc]
    "AttentionRelevance": cta.AttentionRelevance,
    "TransformerRelevance": cta.TransformerRelevance,
}


@dataclass(frozen=True)
class Case:
    """A trained model in float32, inputs, and the target that explains its own choice."""

    name: str
    model: nn.Module
    inputs: dict[str, Tensor]
    target: Any

    def values(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The inputs, the floating ones in another precision."""
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in self.inputs.items()}

    def logits(self, model: nn.Module, dtype: torch.dtype) -> Tensor:
        """The explained numbers, ``(N,)``."""
        with torch.no_grad():
            output = unwrap(model(**self.values(dtype)))
        rows = self.target if isinstance(self.target, list) else [(int(t),) for t in self.target]
        return torch.stack([output[i][tuple(row)] for i, row in enumerate(rows)])


def vision(data: Path, count: int) -> Case:
    """ViT-Tiny of timm on ImageNet samples."""
    weights = data / "vit_tiny_imagenet" / "model.safetensors"
    options = PreprocessingOptions(mean=(0.5,) * 3, std=(0.5,) * 3, squash=True)
    loaded: Any = load_model("vit_tiny_patch16_224", weights, options)
    reader = LabelledImages(data / "imagenet_samples")
    pixels = torch.stack([loaded.preprocessing(Image.fromarray(reader[i].image)) for i in range(count)])
    with torch.no_grad():
        chosen = loaded.model(pixels).argmax(1)
    return Case("ViT-Tiny", loaded.model, {"x": pixels}, chosen)


def text(build: Callable[[Path, int], Any], name: str) -> Callable[[Path, int], Case]:
    """A task of `benchmarks.language_models`."""

    def make(data: Path, count: int) -> Case:
        task = build(data, count)
        inputs = dict(task.batches[0])
        with torch.no_grad():
            target = task.target(task.logits(task.model, inputs).argmax(1))
        return Case(name, task.model, inputs, target)

    return make


CASES = {
    "ViT-Tiny": vision,
    "MiniLM (BERT)": text(sentences, "MiniLM (BERT)"),
    "stories260k": text(stories, "stories260k"),
}


def completeness(case: Case) -> list[str]:
    """Rows of the first table, in float64."""
    model = copy.deepcopy(case.model).double()
    inputs, logits = case.values(torch.float64), case.logits(model, torch.float64)
    rows = []
    for rules in RULES:
        method = cta.TransformerLRP(model, rules)
        relevance, delta = method.attribute(inputs, case.target, return_convergence_delta=True)
        taken = method.parameter_relevance(inputs, case.target)
        sent = logits if rules != "deep_taylor" else torch.ones_like(logits)
        arrived = sum(r.flatten(1).sum(1) for r in relevance.values() if r.is_floating_point())
        shares = [arrived, taken_by(model, taken, False, logits), taken_by(model, taken, True, logits)]
        cells = [f"{float((s / sent).mean()):+.3f}" for s in shares]
        worst = f"{float(delta.abs().max()):.1e}" if rules in CONSERVING else f"({float(delta.abs().max()):.2g})"
        rows.append(
            f"| {case.name} | `{rules}` | {float(sent.abs().mean()):.2f} | {worst} | " + " | ".join(cells) + " |"
        )
    return rows


def taken_by(model: nn.Module, taken: dict[str, Tensor], biases: bool, like: Tensor) -> Tensor:
    """What modules with a bias took, or those without one: sums with positions, class tokens and token types."""
    modules = dict(model.named_modules())
    total = torch.zeros_like(like)
    for path, share in taken.items():
        has_bias = getattr(modules.get(path.partition("#")[0]), "bias", None) is not None
        if has_bias == biases:
            total = total + share
    return total


def precision(case: Case) -> list[str]:
    """Rows of the second table."""
    rows = []
    full, doubles = copy.deepcopy(case.model).double(), case.values(torch.float64)
    for dtype in PRECISIONS:
        model = copy.deepcopy(case.model).to(dtype)
        rounded = copy.deepcopy(model).double()
        same = {name: t.double() if t.is_floating_point() else t for name, t in case.values(dtype).items()}
        for name, make in METHODS.items():
            got = scores_of(make(model), case.values(dtype), case.target)
            exact = scores_of(make(rounded), same, case.target)
            original = scores_of(make(full), doubles, case.target)
            finite = "yes" if bool(torch.isfinite(got).all()) else "no"
            apart = [float((got - want).abs().max() / want.abs().max()) for want in (exact, original)]
            ranks = [rank_correlation(x, y) for x, y in zip(got, original, strict=True)]
            cells = [finite, *(f"{value:.1e}" for value in apart), f"{sum(ranks) / len(ranks):.4f}"]
            rows.append(f"| {case.name} | {str(dtype).removeprefix('torch.')} | {name} | " + " | ".join(cells) + " |")
    return rows


class TenBits(TorchDispatchMode):
    """Matrix products and convolutions of float32 round their factors as TF32 does."""

    PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "convolution": 0, "convolution_backward": 0}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = self.PRODUCTS.get(function.overloadpacket.__name__)
        if first is not None:
            args = (*args[:first], *(ten_bits(a) if isinstance(a, Tensor) else a for a in args[first:]))
        return function(*args, **(kwargs or {}))


def ten_bits(x: Tensor) -> Tensor:
    """float32 with a mantissa of ten bits, rounded to the nearest, ties to even."""
    bits, dropped = x.contiguous().view(torch.int32), 13
    even = (bits >> dropped) & 1
    return ((bits + (1 << (dropped - 1)) - 1 + even) >> dropped << dropped).view(torch.float32)


def reduced(case: Case) -> list[str]:
    """Rows of the third table."""
    rows = []
    for name, make in METHODS.items():
        exact = scores_of(make(case.model), case.inputs, case.target)
        method = make(case.model)
        scores_of(method, case.inputs, case.target)  # what is compared with plain forwards is so in full
        with TenBits():
            got = scores_of(method, case.inputs, case.target)
        apart = float((got - exact).abs().max() / exact.abs().max())
        ranks = [rank_correlation(x, y) for x, y in zip(got, exact, strict=True)]
        rows.append(f"| {case.name} | {name} | {apart:.1e} | {sum(ranks) / len(ranks):.4f} |")
    return rows


def scores_of(method: Any, inputs: dict[str, Tensor], target: Any) -> Tensor:
    """Token scores of the only input that has any, ``(N, tokens)``."""
    (scores,) = (s for s in method.attribute_tokens(inputs, target).values() if s.is_floating_point() and s.any())
    return scores.flatten(1).double()


def main(
    data: Annotated[Path | None, typer.Option(help="Folder of models and data; default CTA_DATA.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Examples per model.")] = 8,
    case: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(CASES)}; several allowed.")] = None,
    out: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
) -> None:
    """Measure, print, and write the tables."""
    unknown = set(case or ()) - set(CASES)
    if unknown:
        raise typer.BadParameter(f"no case {min(unknown)!r}; known: {', '.join(CASES)}")
    if out:
        check_writable(out)
    torch.set_num_threads(1)
    sums, rounded_rows, reduced_rows = [], [], []
    for name in case or CASES:
        one = CASES[name](data or data_folder(), count)
        sums += completeness(one)
        rounded_rows += precision(one)
        reduced_rows += reduced(one)
        new = (sums[-len(RULES) :], rounded_rows[-len(PRECISIONS) * len(METHODS) :], reduced_rows[-len(METHODS) :])
        print("\n".join(sum(new, [])), flush=True)
    text = page(sums, rounded_rows, reduced_rows, count)
    if out:
        write_texts({out: text})


def page(sums: list[str], rounded_rows: list[str], reduced_rows: list[str], count: int) -> str:
    """The tables as Markdown."""
    lines = [
        "# Completeness and precision",
        "",
        described(circumstances()),
        "",
        f"{count} examples per trained model, each explained for the model's own choice.",
        "",
        "## Does relevance add up?",
        "",
        "float64. Sent: mean magnitude of what is sent back, the logit (`deep_taylor`: 1). Delta:"
        " largest difference between that and what arrived. `attnlrp` conserves only where no bias and no softmax is on"
        " the way, so its delta stands in parentheses. Shares are means over the examples of what arrived where,"
        " relative to what was sent.",
        "",
        "| model | rules | sent | delta | inputs | positions, class token, token types | biases, norm shifts |",
        "|---|---|---|---|---|---|---|",
        *sums,
        "",
        "## Precision",
        "",
        "Token scores of the model in this precision: all finite; their largest difference, relative to the largest"
        " score, from float64 with the same rounded weights and from float64 with the original weights; mean Spearman"
        " rank correlation per example with the latter. Half-precision models are followed in float32, so of half"
        " precision only the rounding of weights and inputs is left.",
        "",
        "`deep_taylor`, as published, divides by sums of terms that nearly cancel (queries times keys, residual sums):"
        " single elements get relevance a million times the total, and rounding is magnified as much. On the ViT the"
        " seventh digit of float32 already moves `TransformerRelevance`, which multiplies it by the gradient, by as"
        " much as shown; so it does in a direct implementation of the published rules. Numbers that must be reproduced"
        " on another machine want `model.double()`.",
        "",
        "| model | precision | method | finite | from the rounded weights | from the original weights |"
        " rank correlation |",
        "|---|---|---|---|---|---|---|",
        *rounded_rows,
        "",
        "## Products in TF32",
        "",
        'What `torch.set_float32_matmul_precision("high")` would do on a GPU that has it: float32 scores whose matrix'
        " products and convolutions round their factors to ten bits (simulated), against float32 scores with products"
        " in full; largest difference relative to the largest score, and mean Spearman rank correlation. Rules that"
        " divide by sums that nearly cancel do not survive it, so attribution always computes products in full.",
        "",
        "| model | method | difference | rank correlation |",
        "|---|---|---|---|",
        *reduced_rows,
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
