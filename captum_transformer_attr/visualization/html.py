"""One self-contained HTML page: pictures as data URIs, styles and script inline, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from captum_transformer_attr.visualization.colors import ColorScale, palette, scale_of, text_color, text_scale
from captum_transformer_attr.visualization.report import (
    Example,
    FloatArray,
    ImagePanel,
    Panel,
    Report,
    Table,
    TextPanel,
    visible,
)

LARGEST_PICTURE = 640
"""Pixels of a picture's longer side on the page; larger ones are scaled down."""


def render_html(report: Report) -> str:
    """The page of a report. Every text is escaped.

    Args:
        report: What to show.

    Returns:
        A complete HTML document that needs no other file and no network.
    """
    environment = Environment(
        loader=PackageLoader("captum_transformer_attr.visualization"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    panels = [panel for example in report.examples for panel in example.panels]
    template = environment.get_template("report.html.jinja")
    return template.render(
        title=report.title,
        description=report.description,
        examples=[_example(example) for example in report.examples],
        tables=[_table(table) for table in report.tables],
        has_images=any(isinstance(panel, ImagePanel) for panel in panels),
        has_texts=any(isinstance(panel, TextPanel) for panel in panels),
    )


def breakable(name: str) -> Markup:
    """A class name that a narrow column may break between its words only."""
    return Markup("<wbr>").join(re.split("(?<=[a-z])(?=[A-Z])", name))


def save_html(report: Report, path: str | Path) -> None:
    """Write :func:`render_html` to a file."""
    Path(path).write_text(render_html(report), encoding="utf-8")


def _example(example: Example) -> dict[str, Any]:
    return {
        "title": example.title,
        "note": example.note,
        "classes": [{"label": label, "probability": example.probabilities.get(label)} for label in example.classes],
        "panels": [_panel(panel) for panel in example.panels],
    }


def _panel(panel: Panel) -> dict[str, Any]:
    if isinstance(panel, ImagePanel):
        height, width = panel.image.shape[:2]
        shrink = min(1.0, LARGEST_PICTURE / max(height, width))
        size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        picture = Image.fromarray(panel.image).resize(size, Image.Resampling.LANCZOS) if shrink < 1 else panel.image
        return {
            "kind": "image",
            "title": panel.title,
            "picture": _data_uri(Image.fromarray(np.asarray(picture))),
            "ratio": f"{width} / {height}",
            "classes": [
                [{**_map(method, scores, size), "box": _box(panel, label)} for method, scores in by_method.items()]
                for label, by_method in panel.scores.items()
            ],
        }
    return {
        "kind": "text",
        "title": panel.title,
        "classes": [
            [_colored_text(method, panel.tokens_of(label), scores) for method, scores in by_method.items()]
            for label, by_method in panel.scores.items()
        ],
    }


def _box(panel: ImagePanel, label: str) -> str:
    """The style that places a class's box, empty if it has none."""
    if label not in panel.boxes:
        return ""
    left, top, right, bottom = panel.boxes[label]
    edges = (("left", left), ("top", top), ("right", 1 - right), ("bottom", 1 - bottom))
    return "; ".join(f"{edge}: {100 * max(share, 0):.2f}%" for edge, share in edges)


def _map(method: str, scores: FloatArray, size: tuple[int, int]) -> dict[str, Any]:
    """A score map as a palette PNG: one byte per pixel, the colours and their opacity in the palette."""
    scale = scale_of(scores)
    levels = np.round(255 * scale.position(scores)).astype(np.uint8)
    picture = Image.fromarray(levels)
    if picture.width * picture.height > size[0] * size[1]:
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    picture = picture.convert("L").copy()
    colors = palette(scale.signed)
    indexed = Image.frombytes("P", picture.size, picture.tobytes())
    indexed.putpalette(colors[:, :3].tobytes())
    buffer = io.BytesIO()
    indexed.save(buffer, format="PNG", optimize=False, compress_level=9, transparency=colors[:, 3].tobytes())
    return {"method": method, "uri": _encoded(buffer.getvalue()), **_legend(scale)}


def _colored_text(method: str, words: tuple[str, ...], scores: FloatArray) -> dict[str, Any]:
    scale = text_scale(scores)
    tokens = []
    for token, score in zip(words, scores, strict=True):
        red, green, blue, alpha = text_color(float(score), scale)
        tokens.append(
            {
                "text": visible(token),
                "value": f"{float(score):+.4g}" if scale.signed else f"{float(score):.4g}",
                "background": f"rgba({red}, {green}, {blue}, {alpha:.3f})",
                "strong": alpha > 0.62,
            }
        )
    return {"method": method, "tokens": tokens, **_legend(scale)}


def _legend(scale: ColorScale) -> dict[str, Any]:
    return {
        "low": f"{scale.low:.3g}",
        "high": f"{scale.high:.3g}",
        "signed": scale.signed,
        "flat": scale.flat,
    }


def _table(table: Table) -> dict[str, Any]:
    best = [table.best_row(column) for column in range(len(table.columns))]
    return {
        "title": table.title,
        "caption": table.caption,
        "columns": table.columns,
        "rows": [
            {
                "name": name,
                "cells": [
                    {"text": "–" if value is None else f"{value:.3f}", "best": best[column] == index}
                    for column, value in enumerate(values)
                ],
            }
            for index, (name, values) in enumerate(table.rows)
        ],
    }


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return _encoded(buffer.getvalue())


def _encoded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
