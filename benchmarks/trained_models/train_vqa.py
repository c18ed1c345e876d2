"""Trains the small VisualBERT or LXMERT on easy-VQA, on one thread.

    python -m benchmarks.trained_models.train_vqa --arch visualbert
    python -m benchmarks.trained_models.train_vqa --arch lxmert

Needs the easy-VQA archive (``CTA_DATA``). The checkpoint (weights, configuration, tokenizer, training report) goes to
the cache folder, see `storage`; it is renewed after every epoch.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from benchmarks.trained_models.easy_vqa import (
    EasyVqaSplit,
    load_easy_vqa,
    move_shapes,
    patch_features,
    shape_patches,
)
from benchmarks.trained_models.storage import cache_dir, save_checkpoint
from benchmarks.trained_models.vqa_models import (
    Architecture,
    build_model,
    build_tokenizer,
    checkpoint_name,
    vqa_inputs,
    vqa_logits,
)


class ArchitectureOption(str, Enum):
    """The choices of ``--arch``."""

    visualbert = "visualbert"
    lxmert = "lxmert"


@dataclass(frozen=True)
class VqaTraining:
    """Hyper-parameters of one training run."""

    epochs: int = 8
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    fewest_patches: int = 16
    seed: int = 0


def random_patches(shapes: npt.NDArray[np.bool_], fewest: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Patches to keep in one batch: those of the shape and a random part of the plain background.

    Background patches hold nothing but their colour, so the answers stay right. Models trained this way answer
    shorter inputs too, as perturbation tests need, and a step costs about half.

    Args:
        shapes: ``(N, 64)``, true where a patch has a pixel of the shape.
        fewest: smallest number of patches to keep, at most 64.
        rng: source of the choice.

    Returns:
        ``(N, K)`` ascending patch positions with one random K for the batch.
    """
    fewest = max(fewest, int(shapes.sum(axis=1).max()))
    count = int(rng.integers(fewest, shapes.shape[1] + 1))
    order = np.argsort(rng.random(shapes.shape) - shapes, axis=1)
    return np.sort(order[:, :count], axis=1)


def train_epoch(
    model: PreTrainedModel,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerFast,
    data: EasyVqaSplit,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    settings: VqaTraining,
    rng: np.random.Generator,
    progress: Progress,
) -> float:
    """Trains on every question once; returns the mean loss."""
    model.train()
    images = move_shapes(data.images, rng)
    shapes = np.stack([shape_patches(image).ravel() for image in images])
    batches = np.array_split(rng.permutation(len(data)), -(-len(data) // settings.batch_size))
    task = progress.add_task("training", total=len(batches))
    losses = []
    for batch in batches:
        rows = data.image_indices[batch]
        patches = random_patches(shapes[rows], settings.fewest_patches, rng)
        questions = [data.questions[index] for index in batch]
        inputs = vqa_inputs(architecture, tokenizer, patch_features(images[rows]), questions, patches)
        loss = F.cross_entropy(vqa_logits(model(**inputs)), torch.from_numpy(data.answer_indices[batch]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        progress.update(task, advance=1, description=f"training, loss {np.mean(losses[-50:]):.3f}")
    progress.remove_task(task)
    return float(np.mean(losses))


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerFast,
    data: EasyVqaSplit,
    batch_size: int = 512,
) -> Tensor:
    """The answer index ``(Q,)`` the model gives to every question of a split, from all 64 patches."""
    model.eval()
    answers = []
    for start in range(0, len(data), batch_size):
        stop = start + batch_size
        features = patch_features(data.images[data.image_indices[start:stop]])
        inputs = vqa_inputs(architecture, tokenizer, features, data.questions[start:stop])
        answers.append(vqa_logits(model(**inputs)).argmax(dim=-1))
    return torch.cat(answers)


def accuracies(predictions: Tensor, data: EasyVqaSplit) -> dict[str, float]:
    """Share of right answers over all questions and for each kind of answer there is (yes/no, shape, colour)."""
    right = predictions.numpy() == data.answer_indices
    names = np.array(data.answers)[data.answer_indices]
    yes_no = np.isin(names, ["yes", "no"])
    shape = np.isin(names, ["circle", "rectangle", "triangle"])
    groups = {"all": np.ones_like(yes_no), "yes_no": yes_no, "shape": shape, "colour": ~yes_no & ~shape}
    return {name: round(float(right[group].mean()), 4) for name, group in groups.items() if group.any()}


def train(
    architecture: Architecture,
    train_data: EasyVqaSplit,
    test_data: EasyVqaSplit,
    settings: VqaTraining,
    folder: Path,
) -> dict[str, object]:
    """Trains one model and writes its checkpoint after every epoch; returns the training report.

    The test split only measures: no setting or stopping point is chosen from it here.
    """
    logging.disable_progress_bar()
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    tokenizer = build_tokenizer(train_data.questions)
    model = build_model(architecture, len(tokenizer), train_data.answers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps = settings.epochs * -(-len(train_data) // settings.batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=steps, pct_start=settings.warmup
    )
    report: dict[str, object] = {"architecture": architecture, "settings": asdict(settings)}
    start = time.perf_counter()
    with Progress() as progress:
        epochs = progress.add_task(f"{architecture}, {settings.epochs} epochs", total=settings.epochs)
        for epoch in range(1, settings.epochs + 1):
            loss = train_epoch(
                model, architecture, tokenizer, train_data, optimizer, scheduler, settings, rng, progress
            )
            test_accuracy = accuracies(predict(model, architecture, tokenizer, test_data), test_data)
            report |= {
                "epochs_done": epoch,
                "loss": round(loss, 4),
                "test_accuracy": test_accuracy,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "seconds": round(time.perf_counter() - start),
                "cpu_seconds": round(time.process_time()),
                "threads": torch.get_num_threads(),
            }
            save_checkpoint(folder, model, report, tokenizer)
            progress.console.print(f"epoch {epoch}: loss {loss:.4f}, test {test_accuracy}, {report['seconds']} s")
            progress.advance(epochs)
    return report


def main(
    arch: Annotated[ArchitectureOption, typer.Option(help="The model to train.")],
    epochs: Annotated[int, typer.Option(min=1)] = VqaTraining.epochs,
    seed: Annotated[int, typer.Option()] = VqaTraining.seed,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    cache: Annotated[Path | None, typer.Option(help="Folder of checkpoints; default CTA_CACHE.")] = None,
) -> None:
    """Trains VisualBERT or LXMERT on easy-VQA and writes the checkpoint."""
    torch.set_num_threads(threads)
    try:
        train_data, test_data = load_easy_vqa("train"), load_easy_vqa("test")
    except FileNotFoundError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None
    folder = (cache or cache_dir()) / checkpoint_name(arch.value)
    train(arch.value, train_data, test_data, VqaTraining(epochs=epochs, seed=seed), folder)
    typer.echo(f"wrote {folder}")


if __name__ == "__main__":
    typer.run(main)
