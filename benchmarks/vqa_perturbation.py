"""Bi-modal explanations measured where the relevant region is known: VQA perturbation (ICCV 2021) and detector masks.

    python -m benchmarks.vqa_perturbation                 # docs/results/vqa.md and vqa.json
    python -m benchmarks.vqa_perturbation --count 40      # a quick look

Questions come from easy-VQA (environment variable CTA_DATA, default ../shared/data), scenes are made on the spot.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.trained_models.digit_detector import detector_inputs, load_digit_detr
from benchmarks.trained_models.easy_vqa import PATCH_SIZE, load_easy_vqa, shape_mask
from benchmarks.trained_models.vqa_models import TrainedVqa, load_lxmert_vqa, load_visualbert_vqa, vqa_logits
from captum_transformer_attr.comparison import Method, element_scores, resolve
from captum_transformer_attr.detection import otsu_mask
from captum_transformer_attr.digit_scenes import make_scenes
from captum_transformer_attr.evaluation import random_method
from captum_transformer_attr.metrics import TokenRemoval, curve_area, perturbation_curve

METHODS = (
    "AttentionRelevance",
    "AttentionRelevance:normalize=false",
    "AttentionRelevance:self_terms=false",
    "TransformerRelevance",
    "TransformerLRP",
    "AttentionRollout",
    "RawAttention",
    "AttentionGradCam",
    "InputXGradient",
)
ORDERS = ("positive", "negative")
LOADERS: dict[str, Callable[[], TrainedVqa]] = {"VisualBERT": load_visualbert_vqa, "LXMERT": load_lxmert_vqa}


def methods() -> list[Method]:
    """What is compared, random scores last."""
    return [*resolve(list(METHODS)), random_method()]


# ---------------------------------------------------------------------- questions
def measure_questions(trained: TrainedVqa, count: int, batch: int = 20) -> dict[str, dict[str, Any]]:
    """Per method the perturbation curves of image and question, their areas, and the share of scores on the shape."""
    data = load_easy_vqa("test")
    rows = np.linspace(0, len(data) - 1, count).astype(int)
    regions = "visual_embeds" if trained.architecture == "visualbert" else "visual_feats"
    removals = {
        "image": (regions, region_removal(regions)),
        "question": ("input_ids", TokenRemoval("delete", keep=trained.tokenizer.all_special_ids)),
    }
    found: dict[str, dict[str, Any]] = {}
    for method in methods():
        curves: dict[str, list[Tensor]] = {}
        shares: list[Tensor] = []
        for start in range(0, count, batch):
            chosen = rows[start : start + batch]
            images = data.images[data.image_indices[chosen]]
            inputs = trained.inputs(images, [data.questions[row] for row in chosen])
            with torch.no_grad():
                predicted = vqa_logits(trained.model(**inputs)).argmax(1)
            scores = method.attribute(trained.model, inputs, predicted)
            for part, (entry, removal) in removals.items():
                for order in ORDERS:
                    curve = perturbation_curve(
                        lambda **given: vqa_logits(trained.model(**given)),
                        inputs,
                        element_scores(scores[entry]),
                        predicted,
                        order=order,
                        removal=removal,
                        measure="accuracy",
                    )
                    curves.setdefault(f"{part} {order}", []).append(curve)
            shares.append(shape_share(element_scores(scores[regions]), images))
        whole = {name: torch.cat(parts) for name, parts in curves.items()}
        fractions = removals["image"][1].fractions
        found[method.name] = {
            "auc": {name: float(curve_area(curve, fractions).mean()) for name, curve in whole.items()},
            "curves": {name: curve.float().mean(0).tolist() for name, curve in whole.items()},
            "share on the shape": float(torch.cat(shares).mean()),
        }
    return found


def region_removal(regions: str) -> TokenRemoval:
    """Image regions are truly removed, with their boxes and types."""
    along = ("visual_token_type_ids", "visual_pos")
    return TokenRemoval("delete", tokens=regions, attention_mask="visual_attention_mask", along=along)


def shape_share(scores: Tensor, images: np.ndarray) -> Tensor:
    """Share of the positive scores ``(N, patches)`` that lies on pixels of the shape, spread evenly over each patch."""
    masks = torch.stack([torch.from_numpy(shape_mask(image)) for image in images]).float()
    inside = torch.nn.functional.avg_pool2d(masks[:, None], PATCH_SIZE)[:, 0].flatten(1)
    positive = scores.clamp(min=0)
    total = positive.sum(1)
    return (positive * inside).sum(1) / torch.where(total == 0, 1, total)


# ---------------------------------------------------------------------- detections
def measure_masks(count: int, confidence: float = 0.5, batch: int = 8) -> dict[str, dict[str, float]]:
    """Per method the mean IoU of the Otsu masks of rightly named digits with their exact pixels."""
    model = load_digit_detr()
    scenes = make_scenes(count, seed=20_000)
    totals: dict[str, list[float]] = {}
    for method in methods():
        for start in range(0, count, batch):
            inputs = detector_inputs(scenes.images[start : start + batch])
            with torch.no_grad():
                best, label = model(**inputs).logits.softmax(-1)[..., :-1].max(-1)
            for i in range(len(best)):
                one = {"pixel_values": inputs["pixel_values"][i : i + 1]}
                for query in (best[i] >= confidence).nonzero().flatten().tolist():
                    name = int(label[i, query])
                    if not scenes.labels[start + i, name]:
                        continue
                    scores = method.attribute(model, one, (query, name))
                    relevance = element_scores(scores["pixel_values"])[0]
                    for at in ("tokens", "pixels"):
                        grid = relevance if at == "pixels" else torch.nn.functional.avg_pool2d(relevance[None], 4)[0]
                        mask = otsu_mask(grid, relevance.shape, at)
                        truth = scenes.masks[start + i, name].bool().numpy()
                        union = (mask | truth).sum()
                        totals.setdefault(f"{method.name}|{at}", []).append(float((mask & truth).sum() / max(union, 1)))
    result: dict[str, dict[str, float]] = {}
    for key, values in totals.items():
        name, at = key.split("|")
        result.setdefault(name, {})[f"IoU at {at}"] = float(np.mean(values))
        result[name]["objects"] = len(values)
    return result


# ---------------------------------------------------------------------- report
def table(rows: dict[str, Sequence[float]], columns: Sequence[str]) -> str:
    """A Markdown table."""
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{value:.3g}" for value in values) + " |" for name, values in rows.items()]
    return "\n".join(lines)


def report(questions: dict[str, dict[str, Any]], masks: dict[str, dict[str, float]], count: int, scenes: int) -> str:
    """The whole page."""
    parts = [
        "# Bi-modal explanations where the relevant region is known",
        "",
        "`python -m benchmarks.vqa_perturbation`",
        "",
    ]
    for name, found in questions.items():
        columns = [
            f"{part} {order} {'↓' if order == 'positive' else '↑'}"
            for part in ("image", "question")
            for order in ORDERS
        ]
        rows = {m: [*r["auc"].values(), r["share on the shape"]] for m, r in found.items()}
        parts += [f"## {name}, {count} questions", "", table(rows, [*columns, "share on the shape ↑"]), ""]
    columns = ["IoU at tokens ↑", "IoU at pixels ↑", "objects"]
    rows = {m: [r["IoU at tokens"], r["IoU at pixels"], r["objects"]] for m, r in masks.items()}
    parts += [f"## DETR masks, {scenes} scenes", "", table(rows, columns), ""]
    return "\n".join(parts)


def write_whole(path: Path, text: str) -> None:
    """Write under a temporary name, then move into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=path.suffix, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def main(
    count: Annotated[int, typer.Option(min=2, help="Questions per model.")] = 200,
    scenes: Annotated[int, typer.Option(min=1, help="Scenes for the detector.")] = 40,
    output: Annotated[Path, typer.Option(help="Without ending.")] = Path("docs/results/vqa"),
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Measure and write the tables."""
    torch.set_num_threads(threads)
    questions = {name: measure_questions(load(), count) for name, load in LOADERS.items()}
    masks = measure_masks(scenes)
    write_whole(output.with_suffix(".json"), json.dumps({"questions": questions, "masks": masks}, indent=1))
    write_whole(output.with_suffix(".md"), report(questions, masks, count, scenes))


if __name__ == "__main__":
    typer.run(main)
