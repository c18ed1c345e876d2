"""Train the tiny ViT and Swin that the package ships. About 10 minutes (ViT) and 50 minutes (Swin) on one core:

OMP_NUM_THREADS=1 python -m benchmarks.train_digit_scenes --arch vit
OMP_NUM_THREADS=1 python -m benchmarks.train_digit_scenes --arch swin
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from captum_transformer_attr.digit_scenes import CLASS_NAMES, DigitScenes, make_scenes
from captum_transformer_attr.digit_scenes.models import Architecture, ModelInfo, build, checkpoint_path, save

MEAN, STD = (0.2, 0.2, 0.2), (0.25, 0.25, 0.25)
TEST_SEED, TEST_SCENES = 0, 2000


@dataclass(frozen=True)
class Recipe:
    """One one-cycle run on freshly drawn scenes; every scene is seen once.

    Attributes:
        kwargs: of ``digit_scenes.models.build``.
        images: scenes seen.
        first: seed of the first batch of scenes.
        token_weight: weight of the loss of every patch token against the digits whose ink lies in it (token labelling),
            0 for none.
    """

    kwargs: dict[str, Any]
    images: int
    batch_size: int
    learning_rate: float
    first: int = 0
    token_weight: float = 0.0
    bfloat16: bool = False

    @property
    def steps(self) -> int:
        return self.images // self.batch_size


RECIPES: dict[str, Recipe] = {
    # Without a convolutional stem and labels for its tokens, a ViT does not learn these scenes in hours: nothing tells
    # it where to look.
    "vit": Recipe(
        dict(
            img_size=64, patch_size=1, num_classes=10, embed_dim=64, depth=4, num_heads=4,
            stem=dict(in_chans=3, depth=4, channels=(32, 64, 64, 64), kernel_size=3, stride=(2, 2, 1, 1), padding=1),
        ),
        images=28_800, batch_size=32, learning_rate=3e-3, first=9_000_000, token_weight=5.0,
    ),
    "swin": Recipe(
        dict(
            img_size=64, patch_size=4, num_classes=10, embed_dim=32, depths=(2, 4, 2), num_heads=(2, 4, 8),
            window_size=4, drop_path_rate=0.0,
        ),
        images=500_000, batch_size=128, learning_rate=2e-3, bfloat16=True,
    ),
}  # fmt: skip


def main(
    arch: Annotated[str, typer.Option(help="vit or swin")],
    seed: int = 0,
    scale: Annotated[float, typer.Option(help="multiplies the number of training scenes, for short trials")] = 1.0,
    output: Annotated[Path | None, typer.Option(help="checkpoint file; default: the one in the package")] = None,
) -> None:
    """Train on the training writers, report accuracy on the held-out writers, write the checkpoint."""
    if arch not in RECIPES:
        raise typer.BadParameter(f"{arch!r} is neither 'vit' nor 'swin'", param_hint="--arch")
    architecture: Architecture = "vit" if arch == "vit" else "swin"
    output = output or checkpoint_path(architecture)
    if not output.parent.is_dir():
        raise typer.BadParameter(f"folder {output.parent} does not exist", param_hint="--output")
    random.seed(seed)
    torch.manual_seed(seed)
    recipe = RECIPES[arch]
    model = build(architecture, recipe.kwargs)
    images = train(model, recipe, seed, scale)
    # Measure the weights that are stored.
    model.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    metrics = evaluate(model, make_scenes(TEST_SCENES, "test", TEST_SEED))
    training = {
        "seed": seed,
        "images": images,
        "scale": scale,
        **{k: v for k, v in asdict(recipe).items() if k != "kwargs"},
    }
    save(model, ModelInfo(architecture, recipe.kwargs, MEAN, STD, CLASS_NAMES, training, metrics), output)
    console = Console()
    for name, value in metrics.items():
        console.print(f"{name:>24} {value:.4f}")
    console.print(f"{output} {output.stat().st_size / 1e6:.2f} MB")


def train(model: Any, recipe: Recipe, seed: int, scale: float) -> int:
    """Train in place; returns the number of scenes seen."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )  # fmt: skip
    steps = max(1, int(recipe.steps * scale))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    warm_up = 0.1 if recipe.token_weight else 0.15
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, steps, pct_start=warm_up)
    with Progress(*columns) as progress:
        task = progress.add_task("scenes", total=steps, loss=float("nan"))
        average = None
        for step in range(steps):
            scenes = make_scenes(recipe.batch_size, "train", recipe.first + seed * 10**6 + step)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                loss, shown = losses(model, scenes, recipe.token_weight)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average = shown if average is None else 0.98 * average + 0.02 * shown
            progress.update(task, advance=1, loss=average)
            if not progress.console.is_terminal and step % 100 == 99:
                progress.console.print(f"step {step + 1}/{steps}, loss {average:.4f}")
    return steps * recipe.batch_size


def losses(model: Any, scenes: DigitScenes, token_weight: float) -> tuple[Tensor, float]:
    """The loss to minimise, and the part of it that is about the scene as a whole."""
    images = normalize(scenes.images)
    if not token_weight:
        loss = F.binary_cross_entropy_with_logits(model(images).float(), scenes.labels)
        return loss, loss.item()
    tokens = model.forward_features(images)
    loss = F.binary_cross_entropy_with_logits(model.head(tokens[:, 0]).float(), scenes.labels)
    edge = scenes.masks.shape[-1] // model.patch_embed.grid_size[0]
    inside = F.max_pool2d(scenes.masks.float(), edge).flatten(2).transpose(1, 2)
    return loss + token_weight * F.binary_cross_entropy_with_logits(
        model.head(tokens[:, 1:]).float(), inside
    ), loss.item()


def normalize(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@torch.no_grad()
def evaluate(model: nn.Module, scenes: DigitScenes) -> dict[str, float]:
    """Per-label accuracy, share of scenes with all ten labels right, mean average precision over the classes."""
    model.eval()
    logits = torch.cat([model(normalize(images)) for images in scenes.images.split(250)])
    right = (logits > 0) == (scenes.labels > 0)
    precisions = average_precision_score(scenes.labels.numpy(), logits.numpy(), average=None)
    return {
        "label_accuracy": right.float().mean().item(),
        "exact_match_accuracy": right.all(1).float().mean().item(),
        "mean_average_precision": float(np.mean(precisions)),
    }


if __name__ == "__main__":
    typer.run(main)
