"""The page in a real browser: it opens from the disk, switches classes and moves its overlay."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from captum_transformer_attr.visualization import Example, ImagePanel, Report, Table, TextPanel, save_html

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium with chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield session
    session.quit()


def page() -> Report:
    picture = np.full((64, 64, 3), 200, dtype=np.uint8)
    left, right = np.zeros((64, 64)), np.zeros((64, 64))
    left[:, :32] = 1.0
    right[:, 32:] = 1.0
    image = ImagePanel("image", picture, {"cat": {"A": left, "B": left}, "<dog>": {"A": right, "B": -right}})
    words = TextPanel("text", ("<b>bold</b>", "claim"), {c: {"A": np.array([0.1, 0.9])} for c in ("yes", "no")})
    table = Table("Results", ("score",), (("ours", (0.9,)),), "A caption.", (True,))
    examples = (Example("picture", (image,), {"cat": 0.9}), Example("sentence", (words,)))
    return Report("A page", examples, (table,), "What it shows.")


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Any:
    save_html(page(), tmp_path / "page.html")
    browser.get((tmp_path / "page.html").as_uri())
    return browser


def visible_maps(browser: Any) -> list[str]:
    overlays = browser.find_elements("css selector", ".overlay")
    return [overlay.get_attribute("alt") for overlay in overlays if overlay.is_displayed()]


def test_page_opens_without_errors_or_requests(opened: Any) -> None:
    assert opened.title == "A page"
    assert opened.get_log("browser") == []
    requested = opened.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in requested if not name.startswith("data:")] == []
    widths = opened.execute_script("return [...document.images].map(image => image.naturalWidth)")
    assert widths and all(width == 64 for width in widths)


def test_choosing_a_class_switches_every_method(opened: Any) -> None:
    assert visible_maps(opened) == ["A for cat", "B for cat"]
    opened.find_element("css selector", "[data-example='1'] input[value='1']").click()
    assert visible_maps(opened) == ["A for <dog>", "B for <dog>"]
    # The other example keeps its own choice.
    assert opened.find_element("css selector", "[data-example='2'] input[value='0']").is_selected()


def test_slider_sets_the_opacity_of_all_overlays(opened: Any) -> None:
    slider = opened.find_element("id", "opacity")

    def opacity() -> float:
        return float(opened.execute_script("return getComputedStyle(document.querySelector('.overlay')).opacity"))

    assert opacity() == pytest.approx(0.7)
    slider.send_keys("\ue010")  # End: to the right stop
    assert opacity() == pytest.approx(1.0)
    slider.send_keys("\ue011")  # Home: to the left stop
    assert opacity() == pytest.approx(0.0)
    assert opened.find_element("id", "opacity-value").text == "0 %"


def test_overlay_covers_the_picture_and_changes_what_is_seen(opened: Any) -> None:
    import io

    from PIL import Image

    stack = opened.find_element("css selector", "figure[data-class='0'] .stack")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", stack)

    def halves() -> tuple[np.ndarray, np.ndarray]:
        pixels = np.asarray(Image.open(io.BytesIO(stack.screenshot_as_png)).convert("RGB"), dtype=float)
        height, width = pixels.shape[:2]
        middle = pixels[height // 2]
        return middle[width // 4], middle[3 * width // 4]

    hot, cold = halves()
    assert hot[0] > hot[2] + 60  # the hot end of the scale is red
    assert np.abs(hot - cold).max() > 60
    opened.find_element("id", "opacity").send_keys("\ue011")
    hot, cold = halves()
    np.testing.assert_allclose(hot, [200, 200, 200], atol=2)
    np.testing.assert_allclose(cold, [200, 200, 200], atol=2)


def test_maps_can_be_enlarged_and_closed_again(opened: Any) -> None:
    opened.find_element("css selector", "figure[data-class='0'] .stack").click()
    dialog = opened.find_element("id", "enlarged")
    assert dialog.get_attribute("open") is not None
    assert dialog.find_element("tag name", "p").text == "A for cat"
    dialog.find_element("tag name", "button").click()
    assert dialog.get_attribute("open") is None


def test_tokens_show_their_value_on_hover(opened: Any) -> None:
    token = opened.find_element("css selector", ".line:not([hidden]) .token:nth-of-type(2)")
    assert token.text == "claim"
    webdriver.ActionChains(opened).move_to_element(token).perform()
    shown = opened.execute_script("return getComputedStyle(arguments[0], '::after').content", token)
    assert shown == '"0.9"'
    first = opened.find_element("css selector", ".line:not([hidden]) .token")
    assert first.text == "<b>bold</b>"


def test_page_fits_a_phone(opened: Any) -> None:
    opened.set_window_size(420, 900)
    try:
        overflow = opened.execute_script("return document.documentElement.scrollWidth - innerWidth")
        assert overflow <= 0
    finally:
        opened.set_window_size(1280, 1000)
