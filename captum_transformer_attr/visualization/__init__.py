"""Figures and the self-contained HTML page."""

from captum_transformer_attr.visualization.captum_records import text_records
from captum_transformer_attr.visualization.figures import example_figures, image_figure, overlay, save_png, text_figure
from captum_transformer_attr.visualization.html import render_html, save_html
from captum_transformer_attr.visualization.report import Example, ImagePanel, Report, Table, TextPanel

__all__ = [
    "Example",
    "ImagePanel",
    "Report",
    "Table",
    "TextPanel",
    "example_figures",
    "image_figure",
    "overlay",
    "render_html",
    "save_html",
    "save_png",
    "text_figure",
    "text_records",
]
