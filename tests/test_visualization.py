"""Colours, figures, files and the page, checked against values worked out by hand."""

import base64
import io
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from captum_transformer_attr.visualization import (
    Example,
    ImagePanel,
    Report,
    Table,
    TextPanel,
    example_figures,
    image_figure,
    render_html,
    save_html,
    save_png,
    text_figure,
    text_records,
)
from captum_transformer_attr.visualization.colors import palette, scale_of, text_color, text_scale

PICTURE = np.full((8, 12, 3), 128, dtype=np.uint8)


def image_example(title: str = "scene", labels: tuple[str, ...] = ("cat", "dog")) -> Example:
    ramp = np.linspace(0, 1, 6).reshape(2, 3)
    scores = {label: {"positive": ramp + number, "signed": ramp - 0.5} for number, label in enumerate(labels)}
    return Example(title, (ImagePanel("image", PICTURE, scores),), {labels[0]: 0.75})


def text_example(tokens: tuple[str, ...] = ("not", "good")) -> Example:
    values = np.linspace(-1, 1, len(tokens))
    return Example("text", (TextPanel("sentence", tokens, {"bad": {"A": values}, "fine": {"A": values + 1}}),))


def test_positive_scores_run_from_smallest_to_largest() -> None:
    scale = scale_of(np.array([[1.0, 1.5], [2.0, 3.0]]))
    assert (scale.low, scale.high, scale.signed) == (1.0, 3.0, False)
    np.testing.assert_allclose(scale.position(np.array([1.0, 2.0, 3.0, 9.0])), [0, 0.5, 1, 1])


def test_signed_scores_are_symmetric_around_zero() -> None:
    scale = scale_of(np.array([-1.0, 0.0, 4.0]))
    assert (scale.low, scale.high, scale.signed) == (-4.0, 4.0, True)
    np.testing.assert_allclose(scale.position(np.array([-4.0, 0.0, 2.0])), [0, 0.5, 0.75])


def test_rounding_below_zero_does_not_make_a_map_signed() -> None:
    assert not scale_of(np.array([-1e-9, 0.5, 1.0])).signed
    assert scale_of(np.array([-1e-3, 0.5, 1.0])).signed


def test_large_maps_clip_their_outliers_and_short_sequences_do_not() -> None:
    wide = np.arange(1000.0)
    wide[-1] = 1e6
    assert scale_of(wide).high < 1000
    assert scale_of(np.array([0.0, 1.0, 1e6])).high == 1e6


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_constant_maps_are_flat_and_drawn_at_their_zero(value: float) -> None:
    scale = scale_of(np.full((2, 2), value))
    assert scale.flat or scale.signed
    assert text_color(value, scale)[3] == (1.0 if value < 0 else 0.0)


@pytest.mark.parametrize(
    "scores, opacities",
    [
        ([10.0, 10.1], [10 / 10.1, 1.0]),
        ([1.0], [1.0]),
        ([0.0], [0.0]),
        ([-1.0], [1.0]),
        ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0]),
        ([-1.0, 0.0, 4.0], [0.25, 0.0, 1.0]),
        ([], []),
    ],
)
def test_colours_of_texts_start_at_zero(scores: list[float], opacities: list[float]) -> None:
    scale = text_scale(np.array(scores))
    assert [text_color(score, scale)[3] for score in scores] == pytest.approx(opacities)


def test_long_sequences_reach_to_their_own_largest_score() -> None:
    scores = np.arange(1000.0)
    scores[-1] = 1e6
    assert text_scale(scores).high == 1e6 and text_scale(-scores).low == -1e6


def test_text_colors_tell_for_from_against() -> None:
    scale = scale_of(np.array([-2.0, 2.0, 1.0]))
    red, green, blue, alpha = text_color(1.0, scale)
    assert red > blue and alpha == pytest.approx(0.5)
    red, green, blue, alpha = text_color(-2.0, scale)
    assert blue > red and alpha == pytest.approx(1.0)


@pytest.mark.parametrize("signed", [False, True])
def test_palettes_are_most_transparent_where_nothing_is_said(signed: bool) -> None:
    opacity = palette(signed)[:, 3]
    assert opacity.argmin() in ((127, 128) if signed else (0,))
    assert opacity[-1] == 255


def test_panels_refuse_what_they_cannot_draw() -> None:
    good = np.zeros((2, 2))
    with pytest.raises(ValueError, match="not finite"):
        ImagePanel("image", PICTURE, {"cat": {"A": np.array([[np.nan, 0.0]])}})
    with pytest.raises(ValueError, match="methods"):
        ImagePanel("image", PICTURE, {"cat": {"A": good}, "dog": {"B": good}})
    with pytest.raises(ValueError, match="uint8"):
        ImagePanel("image", PICTURE.astype(float), {"cat": {"A": good}})
    with pytest.raises(ValueError, match="one per token"):
        TextPanel("text", ("a", "b"), {"cat": {"A": np.zeros(3)}})
    with pytest.raises(ValueError, match="no scores"):
        TextPanel("text", ("a",), {})
    with pytest.raises(ValueError, match="differ"):
        Example("both", (image_example().panels[0], text_example().panels[0]))


def test_best_row_follows_the_direction_and_skips_gaps() -> None:
    table = Table(
        "t", ("up", "down", "neither"), (("a", (0.1, 0.1, 1)), ("b", (None, 0.2, 2))), "", (True, False, None)
    )
    assert [table.best_row(column) for column in range(3)] == [0, 0, None]
    with pytest.raises(ValueError, match="has 2 values"):
        Table("t", ("up",), (("a", (1.0, 2.0)),))


@pytest.mark.parametrize("methods, rows, columns", [(6, 2, 7), (9, 4, 5), (7, 4, 4)])
def test_many_methods_go_on_in_the_next_line(methods: int, rows: int, columns: int) -> None:
    maps = {f"method {i}": np.eye(4) * (i + 1) for i in range(methods)}
    panel = ImagePanel("image", PICTURE, {"cat": maps, "dog": maps})
    figure = image_figure(panel)
    assert figure.axes[0].get_gridspec().get_geometry() == (rows, columns)
    assert [axes.get_title() for axes in figure.axes] == 2 * ["", *maps]
    assert [axes.get_title(loc="left") for axes in figure.axes][:: 1 + methods] == ["cat", "dog"]


class Links(HTMLParser):
    """Everything a page would load, and all text between tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]


def test_page_needs_no_other_file_and_no_network() -> None:
    page = render_html(Report("Report", (image_example(), text_example())))
    links = Links(page)
    assert links.sources and all(source.startswith("data:image/png;base64,") for source in links.sources)
    assert "link" not in links.tags
    styles = re.findall(r"url\(([^)]*)\)", page)
    assert styles and all(url.startswith("data:image/png") for url in styles)
    assert not re.search(r"@import|https?://", page)


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "a&b"]
)
def test_page_escapes_every_text_it_is_given(hostile: str) -> None:
    scores = {hostile: {hostile: np.zeros((2, 2))}}
    image = Example(hostile, (ImagePanel(hostile, PICTURE, scores),), {hostile: 0.5}, hostile)
    text = Example(hostile, (TextPanel(hostile, (hostile,), {hostile: {hostile: np.zeros(1)}}),))
    table = Table(hostile, (hostile,), ((hostile, (1.0,)),), hostile)
    plain = Links(render_html(Report("x", (image, text), (table,), "x")))
    page = Links(render_html(Report(hostile, (image, text), (table,), hostile)))
    assert page.tags.count("script") == 1
    assert page.tags == plain.tags
    assert "49" not in render_html(Report("{{ 7 * 7 }}"))


def test_page_maps_hold_the_scores() -> None:
    values = np.array([[0.0, 1.0], [2.0, 4.0]])
    page = render_html(Report("x", (Example("e", (ImagePanel("image", PICTURE, {"cat": {"A": values}}),)),)))
    uri = re.search(r'class="overlay" src="data:image/png;base64,([^"]+)"', page)
    assert uri
    picture = Image.open(io.BytesIO(base64.b64decode(uri.group(1))))
    assert picture.mode == "P"
    np.testing.assert_array_equal(np.asarray(picture), [[0, 64], [128, 255]])
    np.testing.assert_array_equal(np.asarray(picture.convert("RGBA"))[1, 1], palette(False)[255])


def test_page_shows_token_values_probabilities_and_the_best_of_a_table() -> None:
    table = Table("Results", ("score",), (("ours", (0.9,)), ("chance", (0.1,))), "", (True,))
    example = Example("t", text_example().panels, {"bad": 0.873})
    page = render_html(Report("x", (example,), (table,)))
    assert 'data-value="-1"' in page and 'data-value="+1"' in page
    assert "87.3 %" in page
    assert re.findall(r'<td class="best">([^<]+)', page) == ["0.900"]


def test_large_pictures_are_scaled_down_and_keep_their_proportions() -> None:
    picture = np.zeros((1000, 2000, 3), dtype=np.uint8)
    page = render_html(
        Report("x", (Example("e", (ImagePanel("image", picture, {"c": {"A": np.zeros((1000, 2000))}}),)),))
    )
    sizes = {
        Image.open(io.BytesIO(base64.b64decode(encoded))).size
        for encoded in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    }
    assert sizes == {(640, 320)}
    assert "2000 / 1000" in page


def test_figure_is_hot_where_the_scores_are() -> None:
    scores = np.zeros((40, 40))
    scores[:20, :20] = 1.0
    panel = ImagePanel("image", np.full((40, 40, 3), 127, np.uint8), {"cat": {"A": scores}})
    figure = example_figures(Example("e", (panel,)))[0]
    drawn = [axes.get_images()[-1].get_array() for axes in figure.axes]
    heat = np.asarray(drawn[1], dtype=float)
    assert heat[5, 5] == 1.0 and heat[35, 35] == 0.0
    assert [axes.get_title() for axes in figure.axes][1] == "A"


def test_maps_have_a_colour_scale_with_both_ends_and_a_heading() -> None:
    maps = {"signed": np.linspace(-2, 2, 16).reshape(4, 4), "flat": np.ones((4, 4))}
    figure = image_figure(ImagePanel("image", PICTURE, {"$a$ cat": maps}), title="$photo$.png")
    _, signed, flat = figure.axes
    (bar,) = signed.child_axes
    assert np.asarray(bar.get_images()[0].get_array()).shape == (1, 256)
    assert [text.get_text() for text in signed.texts] == ["-2", "2"]
    assert not flat.child_axes and [text.get_text() for text in flat.texts] == ["all scores equal"]
    assert figure.get_suptitle() == "$photo$.png"
    figure.canvas.draw()  # dollar signs are no formula


def test_legends_are_those_of_what_is_shown() -> None:
    words, pictures = (render_html(Report("x", (example,))) for example in (text_example(), image_example()))
    assert "line of text" in words and "words: against" in words and 'id="opacity"' not in words
    assert "low to high" not in words and "Each map" not in words
    assert "low to high" in pictures and "Each map" in pictures and "line of text" not in pictures


def test_several_texts_are_told_apart() -> None:
    scores = {"cat": {"A": np.array([1.0, 2.0])}}
    example = Example("e", (TextPanel("text read", ("a", "b"), scores), TextPanel("written", ("c", "d"), scores)))
    page = render_html(Report("x", (example,)))
    assert re.findall("<h3>([^<]*)", page) == ["text read", "written"]
    assert "<h3>" not in render_html(Report("x", (text_example(),)))
    shown = [[text.get_text() for text in figure.axes[0].texts] for figure in example_figures(example)]
    assert shown[0][0] == "cat  (text read)" and shown[1][0] == "cat  (written)"


def test_flat_and_signed_maps_can_be_drawn(tmp_path: Path) -> None:
    scores = {"cat": {"zero": np.zeros((4, 4)), "signed": np.linspace(-1, 1, 16).reshape(4, 4)}}
    save_png(Report("x", (Example("e", (ImagePanel("image", PICTURE, scores),)), text_example())), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "RGB" and picture.width > 500


def test_long_texts_are_wrapped_and_dollars_are_no_formula(tmp_path: Path) -> None:
    words = tuple(f"$word_{number}$" for number in range(120))
    panel = TextPanel("text", words, {"cat": {"A": np.linspace(0, 1, 120)}})
    figure = example_figures(Example("e", (panel,)))[0]
    assert figure.get_figwidth() == 11.0
    shown = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert set(words) <= set(shown)
    figure.savefig(tmp_path / "long.png")


def one_line(tokens: tuple[str, ...], scores: list[float], label: str = "cat") -> TextPanel:
    return TextPanel("text", tokens, {label: {"A": np.array(scores)}})


def drawn_outside(figure: Figure) -> list[str]:
    """Texts that reach over the edge of the figure, and tokens that reach over their coloured box."""
    figure.canvas.draw()
    (axes,) = figure.axes
    boxes = [box.get_window_extent() for box in axes.patches if isinstance(box, FancyBboxPatch)]
    outside = []
    for text in axes.texts:
        drawn = text.get_window_extent()
        own = [box for box in boxes if text.get_ha() == "center" and box.contains(*(drawn.min + drawn.max) / 2)]
        for frame in own or [figure.bbox]:
            if not (frame.x0 <= drawn.x0 and drawn.x1 <= frame.x1):
                outside.append(text.get_text())
    return outside


@pytest.mark.parametrize("letter", ["W", "i", "日"])
def test_nothing_runs_over_an_edge(letter: str) -> None:
    address, name = letter * 400, " ".join(9 * ["a_very_long_class_name"])
    figure = text_figure(one_line((address, letter * 10, "x"), [1.0, 2.0, 3.0], name), {name: 0.8}, letter * 200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert drawn_outside(figure) == []
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert "80.0\N{NO-BREAK SPACE}%" in shown[0]
    assert "".join(shown).count(letter) >= 610


def test_headings_of_pictures_are_wrapped() -> None:
    panel = ImagePanel("image", PICTURE, {"cat": {"A": np.eye(4)}})
    figure = image_figure(panel, title=" ".join(20 * ["heading"]), note=" ".join(30 * ["note"]))
    figure.canvas.draw()
    for text in figure.texts:
        assert 0 <= text.get_window_extent().x0 and text.get_window_extent().x1 <= figure.bbox.x1


def test_lines_of_text_say_what_their_colours_stand_for() -> None:
    scores = {"cat": {"up": np.array([10.0, 10.1]), "both": np.array([-4.0, 1.0]), "none": np.zeros(2)}}
    panel = TextPanel("text", ("good", "movie"), scores)
    shown = [text.get_text() for text in text_figure(panel).axes[0].texts]
    assert [shown[shown.index(method) + 1 :][:2] for method in ("up", "both")] == [["0", "10"], ["-4", "4"]]
    assert shown[shown.index("none") + 1] == "all scores equal 0"
    page = render_html(Report("x", (Example("e", (panel,)),)))
    assert re.findall(r'legend">([^<]*)<i class="bar ([^"]*)"></i>([^<]*)', page) == [
        ("0", "words-for", "10.1"),
        ("-4", "words", "4"),
    ]
    assert re.findall(r'legend">(all [^<]*)', page) == ["all scores equal 0"]


def test_flat_maps_say_so_on_a_white_picture_too() -> None:
    white = np.full((64, 64, 3), 255, dtype=np.uint8)
    figure = image_figure(ImagePanel("image", white, {"cat": {"A": np.ones((4, 4))}}))
    figure.canvas.draw()
    frame = figure.axes[1].get_window_extent()
    pixels = np.asarray(figure.canvas.buffer_rgba())[::-1, :, :3]
    inside = pixels[int(frame.y0) + 3 : int(frame.y1) - 3, int(frame.x0) + 3 : int(frame.x1) - 3]
    assert inside.min() < 128


def test_white_space_is_visible_and_tokens_stay_in_one_line() -> None:
    panel = one_line(("a\nb", "\t", "\n", "  ", " c"), [1.0, 2.0, 3.0, 4.0, 5.0])
    expected = ["a↵b", "⇥", "↵", "␣␣", " c"]
    assert set(expected) <= {text.get_text() for text in text_figure(panel).axes[0].texts}
    page = render_html(Report("x", (Example("e", (panel,)),)))
    assert re.findall(r'tabindex="0">([^<]*)</span> ', page) == expected


def test_letters_come_from_whatever_font_has_them(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    letter = "\u27c8"  # matplotlib's STIX fonts have it, DejaVu Sans does not
    figure = text_figure(one_line((letter,), [1.0]))
    (drawn,) = (text for text in figure.axes[0].texts if text.get_text() == letter)
    figure.canvas.draw()
    assert len(drawn.get_fontfamily()) == 2 and not recwarn.list


def test_letters_that_no_font_has_are_named_in_one_warning(tmp_path: Path) -> None:
    unassigned = "\U000e0fff\U000e0ffe"
    example = Example("e", (one_line(("good", unassigned), [1.0, 2.0], f"name {unassigned}"),))
    with pytest.warns(UserWarning) as warned:
        save_png(Report("x", (example,)), tmp_path / "a.png")
    assert len(warned) == 1
    assert "no installed font has \U000e0ffe\U000e0fff" in str(warned[0].message)


def test_files_may_be_named_by_strings(tmp_path: Path) -> None:
    report = Report("x", (text_example(),))
    save_html(report, str(tmp_path / "a.html"))
    save_png(report, str(tmp_path / "a.png"))
    assert {path.name for path in tmp_path.iterdir()} == {"a.html", "a.png"}


def test_notes_stand_below_pictures_and_texts() -> None:
    text, image = text_example().panels[0], image_example().panels[0]
    (figure,) = example_figures(Example("e", (text,), {}, "cut off"))
    assert "cut off" in [entry.get_text() for entry in figure.axes[0].texts]
    (figure,) = example_figures(Example("e", (image,), {}, "cut off"))
    assert figure.get_supxlabel() == "cut off"


def test_text_records_are_within_captums_range() -> None:
    records = text_records(text_example(("a", "b", "c")))
    assert len(records) == 2
    for record in records:
        assert record.word_attributions.abs().max() == 1.0
        assert record.raw_input_ids == ["a", "b", "c"]
