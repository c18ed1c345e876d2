"""Train the tiny ViT and Swin that the package ships. About 25 minutes each on one core:

OMP_NUM_THREADS=1 python benchmarks/train_digit_scenes.py --arch vit
OMP_NUM_THREADS=1 python benchmarks/train_digit_scenes.py --arch swin
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

from captum_transformer_attr.digit_scenes import CANVAS_SIZE, CLASS_NAMES, DigitScenes, make_scenes
from captum_transformer_attr.digit_scenes.models import Architecture, ModelInfo, build, checkpoint_path, save

MEAN, STD = (0.2, 0.2, 0.2), (0.25, 0.25, 0.25)
TEST_SEED, TEST_SCENES = 0, 2000


@dataclass(frozen=True)
class Stage:
    """One one-cycle run on freshly drawn scenes; every scene is seen once."""

    canvas_size: int
    digits_per_scene: tuple[int, int]
    images: int
    batch_size: int
    learning_rate: float

    @property
    def steps(self) -> int:
        return max(1, self.images // self.batch_size)


@dataclass(frozen=True)
class Recipe:
    kwargs: dict[str, Any]
    stages: tuple[Stage, ...]
    bfloat16: bool


RECIPES: dict[str, Recipe] = {
    # A ViT learns to read single digits first, on a fifth of the canvas and at a sixth of the cost of a scene.
    "vit": Recipe(
        dict(img_size=64, patch_size=4, num_classes=10, embed_dim=64, depth=6, num_heads=4),
        (
            Stage(28, (1, 1), 200_000, 64, 2e-3),
            Stage(48, (2, 2), 50_000, 64, 1e-3),
            Stage(64, (2, 4), 45_000, 64, 1e-3),
        ),
        bfloat16=False,
    ),
    "swin": Recipe(
        dict(
            img_size=64, patch_size=4, num_classes=10, embed_dim=32, depths=(2, 4, 2), num_heads=(2, 4, 8),
            window_size=4, drop_path_rate=0.0,
        ),
        (Stage(64, (2, 4), 500_000, 128, 2e-3),),
        bfloat16=True,
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
    training = {"seed": seed, "images": images, "stages": [asdict(stage) for stage in recipe.stages], "scale": scale}
    save(model, ModelInfo(architecture, recipe.kwargs, MEAN, STD, CLASS_NAMES, training, metrics), output)
    console = Console()
    for name, value in metrics.items():
        console.print(f"{name:>24} {value:.4f}")
    console.print(f"{output} {output.stat().st_size / 1e6:.2f} MB")


def train(model: nn.Module, recipe: Recipe, seed: int, scale: float) -> int:
    """Train in place; returns the number of scenes seen."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )  # fmt: skip
    seen = 0
    with Progress(*columns) as progress:
        for number, stage in enumerate(recipe.stages):
            steps = max(1, int(stage.steps * scale))
            title = f"{stage.canvas_size}-pixel scenes"
            task = progress.add_task(title, total=steps, loss=float("nan"))
            rate = stage.learning_rate
            optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.15)
            average = None
            for step in range(steps):
                scenes_seed = (seed * len(recipe.stages) + number) * 10**6 + step
                scenes = make_scenes(
                    stage.batch_size, "train", scenes_seed,
                    canvas_size=stage.canvas_size, digits_per_scene=stage.digits_per_scene,
                )  # fmt: skip
                with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                    logits = forward_part(model, normalize(scenes.images))
                loss = F.binary_cross_entropy_with_logits(logits.float(), scenes.labels)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                seen += len(scenes)
                average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
                progress.update(task, advance=1, loss=average)
                if not progress.console.is_terminal and step % 100 == 99:
                    progress.console.print(f"{title}, step {step + 1}/{steps}, loss {average:.4f}")
    return seen


def normalize(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def forward_part(model: Any, images: Tensor) -> Tensor:
    """Logits; a scene smaller than the canvas is read by a ViT as if it lay at a random place of the full canvas."""
    if images.shape[-1] == CANVAS_SIZE:
        return model(images)
    grid = model.patch_embed.grid_size[0]
    tokens = model.patch_embed.proj(images)
    edge = tokens.shape[-1]
    top, left = (random.randint(0, grid - edge) for _ in range(2))
    positions = model.pos_embed[:, 1:].unflatten(1, (grid, grid))[:, top : top + edge, left : left + edge].flatten(1, 2)
    tokens = tokens.flatten(2).transpose(1, 2) + positions
    start = (model.cls_token + model.pos_embed[:, :1]).expand(len(images), -1, -1)
    return model.forward_head(model.norm(model.blocks(torch.cat([start, tokens], dim=1))))


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
