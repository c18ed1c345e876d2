"""Swin maps with and without layer-norm statistics, side by side: docs/swin_statistics.png (from CTA_DATA).

python -m benchmarks.swin_figure                                   # the four of the documentation
python -m benchmarks.swin_figure --count 20 --output /tmp/20.png   # more of them, to look at
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")

import torch
import typer
from matplotlib import pyplot
from PIL import Image

from benchmarks.data_folder import data_folder
from captum_transformer_attr import AttentionRollout, TokenStatisticsRelevance, TransformerRelevance
from captum_transformer_attr.datasets import BoxedImages
from captum_transformer_attr.loading import PreprocessingOptions, load_model


def main(
    count: Annotated[int, typer.Option(help="pictures", min=1)] = 4,
    output: Annotated[Path, typer.Option(help="PNG")] = Path(__file__).parent.parent / "docs" / "swin_statistics.png",
) -> None:
    """Draw pictures whose class the Swin gets right."""
    folder = data_folder() / "swin_tinyimagenet20"
    if not folder.is_dir():
        raise typer.BadParameter(f"{folder} is not there (set CTA_DATA)")
    loaded = load_model(str(folder / "model.safetensors"), None, PreprocessingOptions(squash=True))
    reader = BoxedImages(folder / "validation_images.zip", folder / "validation.json")
    methods = {
        "no statistics": TokenStatisticsRelevance(loaded.model, side="none"),
        "key side": TokenStatisticsRelevance(loaded.model, side="key"),
        "query side": TokenStatisticsRelevance(loaded.model, side="query"),
        "gradient × activation start": TokenStatisticsRelevance(
            loaded.model, side="none", start="gradient_x_activation"
        ),
        "TransformerRelevance": TransformerRelevance(loaded.model),
        "AttentionRollout": AttentionRollout(loaded.model),
    }
    rows = []
    for _, example in reader.examples(range(3, len(reader), 13)):
        pixels = loaded.preprocessing(Image.fromarray(example.image))[None]
        with torch.no_grad():
            right = int(loaded.model(pixels).argmax()) == example.label
        if right and example.mask().mean() < 0.5:
            rows.append(
                (example, {name: m.attribute(pixels, target=example.label)[0, 0] for name, m in methods.items()})
            )
        if len(rows) == count:
            break
    columns = len(methods) + 1
    figure, axes = pyplot.subplots(
        len(rows), columns, figsize=(1.7 * columns, 1.75 * len(rows)), squeeze=False, constrained_layout=True
    )
    for axis_row, (example, maps) in zip(axes, rows, strict=True):
        axis_row[0].imshow(example.image)
        axis_row[0].contour(example.mask(), levels=[0.5], colors="white", linewidths=1)
        for axis, heat in zip(axis_row[1:], maps.values(), strict=True):
            axis.imshow(Image.fromarray(example.image).resize(heat.shape[::-1]).convert("L"), cmap="gray")
            axis.imshow(heat.clamp(min=0), cmap="jet", alpha=0.55)
    for axis, title in zip(axes[0], ["picture and box", *methods], strict=True):
        axis.set_title(title, fontsize=8)
    for axis in axes.flat:
        axis.axis("off")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=90)


if __name__ == "__main__":
    typer.run(main)
