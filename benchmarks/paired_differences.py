"""Is one method ahead of others in both directions? Differences on the same examples, from finished faithfulness runs.

    python -m benchmarks.faithfulness vit-imagenet swin-squares --work build/faithfulness
    python -m benchmarks.paired_differences --work build/faithfulness --task vit-imagenet --task swin-squares

Areas under the perturbation curves of the predicted class; below 0 is better where the most relevant is removed first,
above 0 where the least relevant is. 95 % bootstrap intervals over the examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from captum_transformer_attr.metrics import bootstrap, curve_area

OTHERS = ("AttentionRelevance", "TransformerRelevance", "FullGradPlus")
DIRECTIONS = ("positive", "negative")


def areas(folder: Path, method: str) -> dict[str, Tensor]:
    """Area per example by direction, ``(N,)`` each, of the first kind of removal that was measured."""
    path = folder / f"{method}.npz"
    if not path.is_file():
        raise typer.BadParameter(f"{path} is not there: run `python -m benchmarks.faithfulness {folder.name}` first")
    with np.load(path, allow_pickle=False) as stored:
        names = [key for key in stored.files if key.endswith("/predicted")]
        if any(not any(d in name for name in names) for d in DIRECTIONS):
            raise typer.BadParameter(f"{path} holds no perturbation curves of the predicted class; choose another task")
        chosen = {d: next(n for n in names if d in n) for d in DIRECTIONS}
        curves = {d: torch.from_numpy(stored[name]) for d, name in chosen.items()}
    return {d: curve_area(curve, steps(curve.shape[1])) for d, curve in curves.items()}


def steps(number: int) -> Sequence[float]:
    """The fractions of the protocols: 0, 0.1, …, 0.9 of the pixels; ICCV 2021's nine of the tokens."""
    return [i / 10 for i in range(10)] if number == 10 else [0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1]


def row(folder: Path, method: str, other: str) -> str:
    """One line of the table."""
    first, second = areas(folder, method), areas(folder, other)
    if len(first["positive"]) != len(second["positive"]):
        raise typer.BadParameter(f"{method} and {other} were not measured on the same examples of {folder.name}")
    cells = []
    for direction, sign in zip(DIRECTIONS, (-1, 1), strict=True):
        (found,) = bootstrap(first[direction] - second[direction])
        ahead = sign * (found.high if sign < 0 else found.low) > 0
        text = f"{found.value:+.2f} <sub>{found.low:+.2f} … {found.high:+.2f}</sub>"
        cells.append(f"**{text}**" if ahead else text)
    return f"| {folder.name} | {other} | " + " | ".join(cells) + f" | {len(first['positive'])} |"


def main(
    work: Annotated[Path, typer.Option(help="Folder that the faithfulness runs kept their work in.")],
    task: Annotated[list[str], typer.Option(help="A folder of it; several allowed.")],
    method: Annotated[str, typer.Option(help="The method that is compared.")] = "ConsensusRelevance",
    other: Annotated[list[str] | None, typer.Option(help="What it is compared with; several allowed.")] = None,
) -> None:
    """Print the table."""
    print(f"| table | {method} minus | positive ↓ | negative ↑ | examples |\n|---|---|---|---|---|")
    for name in task:
        for against in other or OTHERS:
            print(row(work / name, method, against))


if __name__ == "__main__":
    typer.run(main)
