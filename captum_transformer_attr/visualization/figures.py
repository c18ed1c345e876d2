"""Pictures for papers and notebooks: matplotlib figures drawn with Captum's own image visualiser."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from captum.attr import visualization as captum_visualization
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from captum_transformer_attr.visualization.colors import ColorScale, scale_of, text_color, text_scale
from captum_transformer_attr.visualization.lettering import (
    Piece,
    fill,
    fonts_for,
    letters_without_font,
    no_glyph_warnings,
    text_width,
    wrap,
)
from captum_transformer_attr.visualization.report import (
    Box,
    Example,
    FloatArray,
    ImagePanel,
    Panel,
    Report,
    TextPanel,
    visible,
)

CELL = 2.0
"""Width and height of one picture of a figure, in inches."""
COLUMNS = 7
"""Pictures side by side at most."""
TEXT_WIDTH = 11.0
LINE_HEIGHT = 0.34
TOKENS_LEFT = 2.4
"""Where the tokens begin, right of the methods' names."""
MARGIN = 0.15
QUIET = "#777777"
NAMED_LETTERS = 20
TEXT_LEGEND = (
    "red: speaks for it, blue: against it; the colours of each line start at 0 and reach to its own largest score"
)


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
        # On a plate of its own, so that it can be read on any picture.
        plate = {"boxstyle": "round,pad=0.2", "facecolor": "black", "alpha": 0.6, "edgecolor": "none"}
        axes.text(
            0.5, 0.05, "all scores equal", ha="center", fontsize=7, color="white", bbox=plate, transform=axes.transAxes
        )
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


def image_figure(
    panel: ImagePanel, probabilities: dict[str, float] | None = None, title: str = "", note: str = ""
) -> Figure:
    """The picture itself and one map per method for every class; more than fit a line go on in the next one.

    Args:
        panel: What to draw.
        probabilities: Class label -> what stands behind it.
        title: Heading.
        note: A sentence at the end.
    """
    with fonts_for((title, note, *_texts(panel))):
        return _image_figure(panel, probabilities, title, note)


def _image_figure(panel: ImagePanel, probabilities: dict[str, float] | None, title: str, note: str) -> Figure:
    classes, methods = list(panel.scores), list(next(iter(panel.scores.values())))
    lines = -(-(1 + len(methods)) // COLUMNS)
    columns = -(-(1 + len(methods)) // lines)
    rows = lines * len(classes)
    # Titles of two lines need room below the line before.
    height = CELL + (0.25 if rows == 1 else 0.45)
    width = CELL * columns
    title, note = fill(title, width - MARGIN, 10, "bold"), fill(note, width - MARGIN, 7)
    extra = 0.17 * title.count("\n") + (0.15 * (1 + note.count("\n")) if note else 0)
    figure = Figure(figsize=(width, height * rows + (0.55 if title else 0.3) + extra), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.005, ha="left", fontsize=10, fontweight="bold", parse_math=False)
    if note:
        figure.supxlabel(note, x=0.005, ha="left", fontsize=7, color=QUIET, parse_math=False)
    grid = figure.subplots(rows, columns, squeeze=False).reshape(len(classes), lines * columns)
    for cells, label in zip(grid, classes, strict=True):
        picture = cells[0]
        picture.imshow(panel.image)
        picture.set_xticks([])
        picture.set_yticks([])
        heading = fill(_class_title(label, probabilities), CELL - MARGIN, 8, "bold")
        picture.set_title(heading, fontsize=8, fontweight="bold", loc="left", parse_math=False)
        for axes, method in zip(cells[1:], methods, strict=False):
            scale = overlay(axes, panel.image, panel.scores[label][method])
            if label in panel.boxes:
                _outline(axes, panel.boxes[label], panel.image.shape[1], panel.image.shape[0])
            axes.set_title(fill(method, CELL - MARGIN, 8), fontsize=8)
            if not scale.flat:
                _legend(axes, scale)
        for axes in cells[1 + len(methods) :]:
            axes.remove()
    return figure


def text_figure(
    panel: TextPanel, probabilities: dict[str, float] | None = None, title: str = "", note: str = ""
) -> Figure:
    """A line (or more, for long texts) of coloured tokens per class and method.

    Args:
        panel: What to draw.
        probabilities: Class label -> what stands behind it.
        title: Stands behind each class.
        note: A sentence at the end.
    """
    with fonts_for((title, note, *_texts(panel))):
        return _text_figure(panel, probabilities, title, note)


def _text_figure(panel: TextPanel, probabilities: dict[str, float] | None, title: str, note: str) -> Figure:
    figure = Figure(figsize=(TEXT_WIDTH, 1.0))
    FigureCanvasAgg(figure)
    # One unit is an inch, downwards; the height is what has been drawn in the end.
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    top = 0.2
    for label, by_method in panel.scores.items():
        heading = _class_title(label, probabilities) + (f"  ({title})" if title else "")
        top = _write(axes, heading, top, 10, weight="bold") + 0.08
        tokens = [visible(token) for token in panel.tokens_of(label)]
        lines = wrap(tokens, TEXT_WIDTH - TOKENS_LEFT - MARGIN, 8, padding=0.14, gap=0.04)
        for method, scores in by_method.items():
            top = _draw_line(axes, method, lines, scores, top)
        top += 0.1
    for remark in filter(None, (note, TEXT_LEGEND)):
        top = _write(axes, remark, top, 7, color=QUIET) + 0.05
    figure.set_size_inches(TEXT_WIDTH, top + 0.1)
    axes.set_xlim(0, TEXT_WIDTH)
    axes.set_ylim(top + 0.1, 0)
    axes.set_aspect("auto")
    axes.axis("off")
    return figure


def example_figures(example: Example) -> list[Figure]:
    """The figures of an example, one per panel; its note stands below the last."""
    probabilities = dict(example.probabilities)
    notes = [""] * (len(example.panels) - 1) + [example.note]
    return [
        image_figure(panel, probabilities, example.title, note)
        if isinstance(panel, ImagePanel)
        else text_figure(panel, probabilities, panel.title if len(example.panels) > 1 else "", note)
        for panel, note in zip(example.panels, notes, strict=True)
    ]


def missing_letters_note(report: Report) -> str:
    """A sentence about the letters that pictures of a report show as boxes; empty if there are none."""
    texts = [
        text
        for example in report.examples
        for panel in example.panels
        for text in (example.title, example.note, *_texts(panel))
    ]
    letters = letters_without_font(texts)
    if not letters:
        return ""
    shown = letters if len(letters) <= NAMED_LETTERS else f"{letters[:NAMED_LETTERS]}…"
    return f"no installed font has {shown}: the picture shows boxes instead, the HTML page shows the letters"


def save_png(report: Report, path: str | Path, dots_per_inch: int = 130) -> None:
    """Write all examples of a report as one PNG, one under the other.

    Warns of letters that no installed font has.

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
            with no_glyph_warnings():
                canvas.draw()
            pictures.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    if not pictures:
        raise ValueError("the report has no example to draw")
    note = missing_letters_note(report)
    if note:
        warnings.warn(note, stacklevel=2)
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
        return f"{label}  {100 * probabilities[label]:.1f}\N{NO-BREAK SPACE}%"
    return label


def _texts(panel: Panel) -> list[str]:
    """All that a figure of a panel writes."""
    texts = [panel.title, *panel.scores, *(method for by_method in panel.scores.values() for method in by_method)]
    if isinstance(panel, TextPanel):
        texts += [visible(token) for label in panel.scores for token in panel.tokens_of(label)]
    return texts


def _write(axes: Axes, text: str, top: float, size: float, *, right: float = TEXT_WIDTH, **style: Any) -> float:
    """Lines of text from ``top`` on; where they end."""
    lines = fill(text, right - 2 * MARGIN, size, style.get("weight", "normal"))
    axes.text(MARGIN, top, lines, fontsize=size, va="top", parse_math=False, **style)
    # matplotlib's lines are 1.2 font sizes apart.
    return top + 1.2 * size / 72 * (1 + lines.count("\n"))


def _draw_line(axes: Axes, method: str, lines: list[list[Piece]], scores: FloatArray, top: float) -> float:
    """A method's name, its legend and its coloured tokens; where they end."""
    scale = text_scale(scores)
    for number, line in enumerate(lines):
        for piece in line:
            middle = top + (number + 0.5) * LINE_HEIGHT
            _draw_token(axes, piece, middle, text_color(float(scores[piece.index]), scale))
    below = _write(axes, method, top + 0.08, 8, right=TOKENS_LEFT, color="#444444")
    _text_legend(axes, scale, below + 0.06)
    return max(top + LINE_HEIGHT * len(lines), below + 0.15) + 0.08


def _text_legend(axes: Axes, scale: ColorScale, middle: float) -> None:
    """What the ends of a line's colours stand for."""
    style: dict[str, Any] = {"fontsize": 6, "va": "center", "color": QUIET}
    if scale.flat:
        axes.text(MARGIN, middle, f"all scores equal {scale.high:.2g}", **style)
        return
    low = f"{scale.low:.2g}"
    left = MARGIN + text_width(low, 6) + 0.04
    right = left + 0.7
    colors = np.array([text_color(float(score), scale) for score in np.linspace(scale.low, scale.high, 256)])
    colors[:, :3] /= 255
    axes.imshow(colors[None], extent=(left, right, middle + 0.035, middle - 0.035), aspect="auto")
    axes.text(MARGIN, middle, low, **style)
    axes.text(right + 0.04, middle, f"{scale.high:.2g}", **style)


def _draw_token(axes: Axes, piece: Piece, middle: float, color: tuple[int, int, int, float]) -> None:
    red, green, blue, alpha = color
    box = FancyBboxPatch(
        (TOKENS_LEFT + piece.left, middle - 0.12),
        piece.width,
        0.24,
        boxstyle="round,pad=0.0,rounding_size=0.05",
        facecolor=(red / 255, green / 255, blue / 255, alpha),
        edgecolor="none",
    )
    axes.add_patch(box)
    # parse_math off: a dollar sign of the text is a dollar sign.
    axes.text(
        TOKENS_LEFT + piece.left + piece.width / 2,
        middle + 0.01,
        piece.text,
        fontsize=8,
        ha="center",
        va="center",
        color="white" if alpha > 0.7 else "#222222",
        parse_math=False,
    )
