"""Trains the small DETR on digit scenes, on one thread.

    python -m benchmarks.trained_models.train_detr

As the published DETR starts from a backbone that was trained to classify, this one starts from a backbone that was
trained (with batch normalisation, which DETR then freezes) to name the digit at every cell of its feature map. The
checkpoint (weights, configuration, training report) goes to the cache folder, see `storage`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoBackbone, DetrForObjectDetection
from transformers.utils import logging

from benchmarks.trained_models.digit_detector import (
    CHECKPOINT_NAME,
    STRIDE,
    average_precision,
    build_model,
    detection_labels,
    detector_inputs,
)
from benchmarks.trained_models.storage import cache_dir, save_checkpoint
from captum_transformer_attr.digit_scenes import CLASS_NAMES, DigitScenes, make_scenes


@dataclass(frozen=True)
class DetrTraining:
    """Hyper-parameters of one training run."""

    scenes: int = 8000
    held_out_scenes: int = 500
    batch_size: int = 32
    backbone_steps: int = 500
    backbone_learning_rate: float = 3e-3
    steps: int = 6000
    learning_rate: float = 5e-4
    weight_decay: float = 1e-4
    warmup: float = 0.1
    save_every: int = 500
    seed: int = 0


class ScenePool:
    """Training scenes made once and drawn from at random.

    Attributes:
        images: ``(N, 3, S, S)`` uint8, a quarter of the memory of floats.
        labels: N label dictionaries of `detection_labels`.
        cells: ``(N, S/4, S/4)`` int64, class of the digit whose box holds the centre of the cell; 10 for none.
    """

    def __init__(self, count: int, seed: int, progress: Progress, chunk: int = 250) -> None:
        task = progress.add_task("drawing scenes", total=count)
        images, self.labels, cells = [], [], []
        for start in range(0, count, chunk):
            scenes = make_scenes(min(chunk, count - start), "train", seed=seed + start)
            images.append((scenes.images * 255).round().byte())
            self.labels += detection_labels(scenes)
            cells.append(cell_classes(scenes))
            progress.advance(task, len(scenes))
        self.images, self.cells = torch.cat(images), torch.cat(cells)
        progress.remove_task(task)

    def batches(self, steps: int, size: int, rng: np.random.Generator) -> Iterator[tuple[Tensor, list[int]]]:
        """`steps` random batches: images ``(size, 3, S, S)`` in [0, 1], colour channels permuted, and scene numbers."""
        for _ in range(steps):
            rows = rng.integers(0, len(self.images), size).tolist()
            channels = torch.from_numpy(rng.permuted(np.tile(np.arange(3), (size, 1)), axis=1))
            images = self.images[rows].float() / 255
            yield images.gather(1, channels[:, :, None, None].expand_as(images)), rows


def cell_classes(scenes: DigitScenes) -> Tensor:
    """Class ``(N, S/4, S/4)`` of the digit whose box holds the centre of each feature cell; 10 where there is none."""
    cells = scenes.images.shape[-1] // STRIDE
    centres = (torch.arange(cells) + 0.5) * STRIDE
    left, top, right, bottom = scenes.boxes[..., None].unbind(dim=2)  # each (N, 10, 1)
    rows = (centres >= top) & (centres < bottom)
    columns = (centres >= left) & (centres < right)
    inside = (rows[..., :, None] & columns[..., None, :]).float()
    return torch.cat([inside, torch.full_like(inside[:, :1], 0.5)], dim=1).argmax(dim=1)


def train_backbone(model: DetrForObjectDetection, pool: ScenePool, settings: DetrTraining, progress: Progress) -> float:
    """Trains a copy of the detector's backbone to classify cells, and gives the detector its weights.

    Returns:
        The share of rightly named cells among those inside a digit's box, over the last 20 batches.
    """
    backbone = AutoBackbone.from_config(model.config.backbone_config)
    head = nn.Conv2d(backbone.channels[-1], len(CLASS_NAMES) + 1, kernel_size=1)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.backbone_learning_rate, weight_decay=settings.weight_decay)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.backbone_learning_rate, total_steps=settings.backbone_steps
    )
    rng = np.random.default_rng(settings.seed)
    task = progress.add_task("backbone", total=settings.backbone_steps)
    backbone.train()
    shares = []
    for images, rows in pool.batches(settings.backbone_steps, settings.batch_size, rng):
        logits = head(backbone(**detector_inputs(images)).feature_maps[-1])
        target = pool.cells[rows]
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        inside = target < len(CLASS_NAMES)
        shares.append(float((logits.argmax(dim=1) == target)[inside].float().mean()))
        progress.update(task, advance=1, description=f"backbone, {100 * np.mean(shares[-20:]):.0f} % of digit cells")
    progress.remove_task(task)
    model.model.backbone.model.load_state_dict(backbone.state_dict())
    return float(np.mean(shares[-20:]))


def train(settings: DetrTraining, folder: Path) -> dict[str, object]:
    """Trains the detector and writes its checkpoint every `save_every` steps; returns the training report.

    Scenes for measuring have digits of writers who are in no training scene; they only measure.
    """
    logging.disable_progress_bar()
    torch.manual_seed(settings.seed)
    model = build_model()
    held_out = make_scenes(settings.held_out_scenes, "test", seed=settings.seed)
    report: dict[str, object] = {"settings": asdict(settings), "threads": torch.get_num_threads()}
    report["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    start = time.perf_counter()
    with Progress() as progress:
        pool = ScenePool(settings.scenes, settings.seed, progress)
        if settings.backbone_steps:
            report["backbone_cell_accuracy"] = round(train_backbone(model, pool, settings, progress), 4)
            progress.console.print(f"backbone: {report['backbone_cell_accuracy']}, {time.perf_counter() - start:.0f} s")
        model.requires_grad_(True)  # the class freezes the first backbone stage, here the only one
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=settings.warmup
        )
        task = progress.add_task("DETR", total=settings.steps)
        rng = np.random.default_rng(settings.seed + 1)
        losses = []
        for step, (images, rows) in enumerate(pool.batches(settings.steps, settings.batch_size, rng), start=1):
            model.train()
            loss = model(**detector_inputs(images), labels=[pool.labels[row] for row in rows]).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            progress.update(task, advance=1, description=f"DETR, loss {np.mean(losses[-50:]):.3f}")
            if step % settings.save_every == 0 or step == settings.steps:
                report |= {
                    "steps_done": step,
                    "loss": round(float(np.mean(losses[-200:])), 4),
                    "held_out_ap50": round(average_precision(model, held_out), 4),
                    "seconds": round(time.perf_counter() - start),
                    "cpu_seconds": round(time.process_time()),
                }
                save_checkpoint(folder, model, report)
                progress.console.print(
                    f"step {step}: loss {report['loss']}, AP@0.5 {report['held_out_ap50']}, {report['seconds']} s"
                )
    return report


def main(
    steps: Annotated[int, typer.Option(min=1)] = DetrTraining.steps,
    seed: Annotated[int, typer.Option()] = DetrTraining.seed,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    cache: Annotated[Path | None, typer.Option(help="Folder of checkpoints; default CTA_CACHE.")] = None,
) -> None:
    """Trains a small DETR on digit scenes and writes the checkpoint."""
    torch.set_num_threads(threads)
    folder = (cache or cache_dir()) / CHECKPOINT_NAME
    train(DetrTraining(steps=steps, seed=seed), folder)
    typer.echo(f"wrote {folder}")


if __name__ == "__main__":
    typer.run(main)
