"""Pictures for papers and notebooks: matplotlib figures drawn with Captum's own image visualiser."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from captum.attr import visualization as captum_visualization
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from captum_transformer_attr.visualization.colors import ColorScale, scale_of, text_color
from captum_transformer_attr.visualization.report import Box, Example, FloatArray, ImagePanel, Report, TextPanel

CELL = 2.0
"""Width and height of one picture of a figure, in inches."""
COLUMNS = 7
"""Pictures side by side at most."""
TEXT_WIDTH = 11.0
LINE_HEIGHT = 0.34
TEXT_LEGEND = "red: speaks for it, blue: against it; the colours of each line reach to its own largest score"


def overlay(axes: Axes, image: np.ndarray, scores: FloatArray, opacity: float = 0.6) -> ColorScale:
    """Draw a picture with its score map over it, by Captum's ``visualize_image_attr``.

    Args:
        axes: Where to draw.
        image: ``(H, W, 3)`` uint8.
        scores: ``(h, w)``; stretched to the picture bilinearly.
        opacity: Of the map, 0 to 1.

    Returns:
        The colour scale used.
    """
    scale = scale_of(scores)
    if scale.flat:
        # Captum refuses a map without any spread; the picture alone, with a word, says as much.
        axes.imshow(image)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.03, "all scores equal", ha="center", fontsize=7, color="white", transform=axes.transAxes)
        return scale
    height, width = image.shape[:2]
    position = Image.fromarray(scale.position(scores).astype(np.float32))
    stretched = np.asarray(position.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float64)
    captum_visualization.visualize_image_attr(
        2.0 * stretched[..., None] - 1.0 if scale.signed else stretched[..., None],
        image,
        method="blended_heat_map",
        sign="all" if scale.signed else "positive",
        plt_fig_axis=(axes.figure, axes),
        # The scale above already cut the outliers off; at exactly 0 Captum's cumulative sum can miss its own total.
        outlier_perc=1e-6,
        cmap=scale.colormap,
        alpha_overlay=opacity,
        use_pyplot=False,
    )
    return scale


def image_figure(panel: ImagePanel, probabilities: dict[str, float] | None = None, title: str = "") -> Figure:
    """The picture itself and one map per method for every class; more than fit a line go on in the next one."""
    classes, methods = list(panel.scores), list(next(iter(panel.scores.values())))
    lines = -(-(1 + len(methods)) // COLUMNS)
    columns = -(-(1 + len(methods)) // lines)
    rows = lines * len(classes)
    # Titles of two lines need room below the line before.
    height = CELL + (0.25 if rows == 1 else 0.45)
    figure = Figure(figsize=(CELL * columns, height * rows + (0.55 if title else 0.3)), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.005, ha="left", fontsize=10, fontweight="bold", parse_math=False)
    grid = figure.subplots(rows, columns, squeeze=False).reshape(len(classes), lines * columns)
    for cells, label in zip(grid, classes, strict=True):
        picture = cells[0]
        picture.imshow(panel.image)
        picture.set_xticks([])
        picture.set_yticks([])
        heading = textwrap.fill(_class_title(label, probabilities), 24)
        picture.set_title(heading, fontsize=8, fontweight="bold", loc="left", parse_math=False)
        for axes, method in zip(cells[1:], methods, strict=False):
            scale = overlay(axes, panel.image, panel.scores[label][method])
            if label in panel.boxes:
                _outline(axes, panel.boxes[label], panel.image.shape[1], panel.image.shape[0])
            axes.set_title(textwrap.fill(method, 24), fontsize=8)
            if not scale.flat:
                _legend(axes, scale)
        for axes in cells[1 + len(methods) :]:
            axes.remove()
    return figure


def text_figure(panel: TextPanel, probabilities: dict[str, float] | None = None, title: str = "") -> Figure:
    """A line (or more, for long texts) of coloured tokens per class and method; the title stands behind each class."""
    blocks = {label: _wrap(panel.tokens_of(label), TEXT_WIDTH - 2.6) for label in panel.scores}
    heights = {label: LINE_HEIGHT * (len(lines) + 0.35) for label, lines in blocks.items()}
    height = (
        0.3
        + LINE_HEIGHT
        + sum(LINE_HEIGHT + heights[label] * len(by_method) for label, by_method in panel.scores.items())
    )
    figure = Figure(figsize=(TEXT_WIDTH, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, TEXT_WIDTH)
    axes.set_ylim(height, 0)
    axes.axis("off")
    top = 0.3
    for label, by_method in panel.scores.items():
        heading = _class_title(label, probabilities) + (f"  ({title})" if title else "")
        axes.text(0.15, top, heading, fontsize=10, fontweight="bold", va="center", parse_math=False)
        top += LINE_HEIGHT
        for method, scores in by_method.items():
            axes.text(0.15, top, textwrap.fill(method, 30), fontsize=8, va="center", color="#444444")
            _draw_tokens(axes, panel.tokens_of(label), blocks[label], scores, top)
            top += heights[label]
    axes.text(0.15, top, TEXT_LEGEND, fontsize=7, va="center", color="#777777")
    return figure


def example_figures(example: Example) -> list[Figure]:
    """The figures of an example, one per panel."""
    probabilities = dict(example.probabilities)
    return [
        image_figure(panel, probabilities, example.title)
        if isinstance(panel, ImagePanel)
        else text_figure(panel, probabilities, panel.title if len(example.panels) > 1 else "")
        for panel in example.panels
    ]


def save_png(report: Report, path: Path, dots_per_inch: int = 130) -> None:
    """Write all examples of a report as one PNG, one under the other.

    Args:
        report: What to draw; its tables are left to the HTML page.
        path: Where to write.
        dots_per_inch: Resolution.
    """
    pictures = []
    for example in report.examples:
        for figure in example_figures(example):
            figure.set_dpi(dots_per_inch)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            pictures.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    if not pictures:
        raise ValueError("the report has no example to draw")
    page = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        page.paste(picture, (0, top))
        top += picture.height
    page.save(path, format="PNG", optimize=True)


def _legend(axes: Axes, scale: ColorScale) -> None:
    """The colour scale below a map, between its two ends."""
    bar = axes.inset_axes((0.27, -0.085, 0.46, 0.035))
    bar.imshow(np.linspace(0, 1, 256)[None], cmap=scale.colormap, aspect="auto")
    bar.set_axis_off()
    for x, side, value in ((0.25, "right", scale.low), (0.75, "left", scale.high)):
        axes.text(x, -0.07, f"{value:.2g}", ha=side, va="center", fontsize=6, transform=axes.transAxes)


def _outline(axes: Axes, box: Box, width: int, height: int) -> None:
    left, top, right, bottom = box
    corner, size = (left * width, top * height), ((right - left) * width, (bottom - top) * height)
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=1.5))


def _class_title(label: str, probabilities: dict[str, float] | None) -> str:
    if probabilities and label in probabilities:
        return f"{label}  {100 * probabilities[label]:.1f} %"
    return label


def _wrap(tokens: tuple[str, ...], width: float) -> list[list[tuple[int, float, float]]]:
    """Break tokens into lines: per line ``(token index, left edge, width)`` in inches, by an average letter width."""
    lines: list[list[tuple[int, float, float]]] = [[]]
    left = 0.0
    for index, token in enumerate(tokens):
        needed = 0.085 * max(len(token), 1) + 0.12
        if left + needed > width and lines[-1]:
            lines.append([])
            left = 0.0
        lines[-1].append((index, left, needed))
        left += needed + 0.04
    return lines


def _draw_tokens(
    axes: Axes, tokens: tuple[str, ...], lines: list[list[tuple[int, float, float]]], scores: FloatArray, top: float
) -> None:
    scale = scale_of(scores)
    for number, line in enumerate(lines):
        for index, left, width in line:
            middle = top + number * LINE_HEIGHT
            _draw_token(axes, tokens[index], 2.4 + left, middle, width, text_color(float(scores[index]), scale))


def _draw_token(
    axes: Axes, token: str, left: float, middle: float, width: float, color: tuple[int, int, int, float]
) -> None:
    red, green, blue, alpha = color
    box = FancyBboxPatch(
        (left, middle - 0.12),
        width,
        0.24,
        boxstyle="round,pad=0.0,rounding_size=0.05",
        facecolor=(red / 255, green / 255, blue / 255, alpha),
        edgecolor="none",
    )
    axes.add_patch(box)
    # parse_math off: a dollar sign of the text is a dollar sign.
    axes.text(
        left + width / 2,
        middle + 0.01,
        token,
        fontsize=8,
        ha="center",
        va="center",
        color="white" if alpha > 0.7 else "#222222",
        parse_math=False,
    )
