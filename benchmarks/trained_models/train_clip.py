"""Trains the small CLIP on drawings of coloured shapes with their captions, on one thread; needs no data.

    python -m benchmarks.trained_models.train_clip

The checkpoint goes to the cache folder, see `storage`.
"""

from __future__ import annotations

import time
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from benchmarks.trained_models.shape_pairs import (
    CHECKPOINT_NAME,
    THINGS,
    TrainedClip,
    build_model,
    caption,
    draw,
    random_things,
    tokenizer_of_captions,
)
from benchmarks.trained_models.storage import cache_dir, save_checkpoint

LEARNING_RATE = 2e-3


def contrastive_loss(model: CLIPModel, drawn: list[set], inputs: dict[str, Tensor]) -> Tensor:
    """CLIP's loss; pictures of the same things fit each other's captions as well as their own."""
    logits = model(**inputs).logits_per_image
    same = torch.tensor([[a == b for a in drawn] for b in drawn]).float()
    same = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2


@torch.no_grad()
def accuracy(clip: TrainedClip, pictures: int, rng: np.random.Generator) -> float:
    """How often a picture of two things fits its own caption best among the captions of all pairs of things."""
    pairs = [(a, b) for i, a in enumerate(THINGS) for b in THINGS[i + 1 :]]
    chosen = rng.integers(len(pairs), size=pictures)
    inputs = clip.inputs([draw(pairs[i], rng) for i in chosen], [caption(pair) for pair in pairs])
    best = clip.model(**inputs).logits_per_image.argmax(1)
    return float((best == torch.from_numpy(chosen)).float().mean())


def main(
    steps: Annotated[int, typer.Option(min=1)] = 1500,
    batch_size: Annotated[int, typer.Option(min=2)] = 64,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train and write the checkpoint."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = tokenizer_of_captions()
    clip = TrainedClip(build_model(tokenizer), tokenizer)
    optimizer = torch.optim.AdamW(clip.model.parameters(), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    begun = time.process_time()
    with Progress() as progress:
        task = progress.add_task("training", total=steps)
        for _ in range(steps):
            drawn = [random_things(rng) for _ in range(batch_size)]
            inputs = clip.inputs([draw(things, rng) for things in drawn], [caption(things) for things in drawn])
            loss = contrastive_loss(clip.model, [set(things) for things in drawn], inputs)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(clip.model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            progress.update(task, advance=1, description=f"training, loss {loss.item():.3f}")
    clip.model.eval()
    report = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": LEARNING_RATE,
        "seed": seed,
        "loss": round(loss.item(), 4),
        "accuracy_among_66_captions": round(accuracy(clip, 500, np.random.default_rng(10_000 + seed)), 4),
        "parameters": sum(p.numel() for p in clip.model.parameters()),
        "cpu_seconds": round(time.process_time() - begun),
    }
    save_checkpoint(cache_dir() / CHECKPOINT_NAME, clip.model, report, tokenizer)
    print(report)


if __name__ == "__main__":
    typer.run(main)
