"""The report in a real browser; skipped without Playwright and Chromium."""

import io
import shutil

import numpy as np
import PIL.Image
import pytest
from synthetic_run import CONFIG, datasets, write_run

from empssl_jax.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
ARGUMENTS += " --disable-component-update --disable-sync"
sync_api = pytest.importorskip("playwright.sync_api", reason='pip install -e ".[browser]" for the tests in a browser')
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian's package chromium)")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "seen"
    write_run(folder)
    return write_report.write_report(folder, CONFIG, datasets())


@pytest.fixture
def open_page(page_file, tmp_path):
    """Opens the report with a window width and a colour scheme; console messages and network requests fail the test."""
    complaints, requests = [], []
    with sync_api.sync_playwright() as playwright:
        contexts = []

        def opened(width, scheme="light"):
            context = playwright.chromium.launch_persistent_context(
                str(tmp_path / f"profile{len(contexts)}"),
                executable_path=CHROMIUM,
                args=ARGUMENTS.split(),
                viewport={"width": width, "height": 844},
                color_scheme=scheme,
            )
            contexts.append(context)
            page = context.pages[0]
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("request", lambda request: requests.append(request.url))
            page.goto(page_file.as_uri())
            return page

        yield opened
        for context in contexts:
            context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def screenshot(page):
    return np.asarray(PIL.Image.open(io.BytesIO(page.screenshot())).convert("RGB"))


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_window_and_shows_its_parts(open_page, width):
    page = open_page(width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for section in ("training", "patches", "maps", "neighbours", "classes", "accuracy", "spectrum", "options"):
        assert page.locator(f"#{section} h2").is_visible(), section
    columns = page.locator("#training .grid").evaluate("e => getComputedStyle(e).gridTemplateColumns.split(' ').length")
    assert columns == (1 if width == 390 else 3)
    assert page.locator("img:not([alt])").count() == 0
    assert page.locator("img").evaluate_all("all => all.every(one => one.complete && one.naturalWidth > 0)")
    assert page.locator("svg:not([role=img]):not([aria-hidden])").count() == 0


def test_pointing_at_a_dot_shows_its_image(open_page):
    page = open_page(1280)
    peek = page.locator("#peek")
    assert peek.is_hidden()
    dot = page.locator(".map circle").nth(17)
    dot.scroll_into_view_if_needed()
    # Scrolling hides the picture. The page receives the scroll event with its next frame.
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    dot.dispatch_event("pointerover")
    assert peek.is_visible()
    labels = datasets().test.labels
    assert peek.inner_text().startswith(str(labels[17]))
    assert "(test image 17)" in peek.inner_text()
    shown = np.asarray(PIL.Image.open(io.BytesIO(peek.locator("i").screenshot())).convert("L").resize((32, 32)), float)
    images = datasets().test.images[..., 0].astype(float)
    similar = [np.corrcoef(shown.ravel(), image.ravel())[0, 1] for image in images]
    assert np.argmax(similar) == 17
    page.locator("h1").dispatch_event("pointerover")
    assert peek.is_hidden()


def test_a_class_can_be_singled_out(open_page):
    page = open_page(1280)
    page.locator(".legend button").nth(3).click()
    dimmed = page.locator(".map circle:not(.dim)").evaluate_all("all => all.map(one => one.classList[0])")
    assert set(dimmed) == {"c3"}
    page.locator(".legend button").nth(3).click()
    assert page.locator(".map circle.dim").count() == 0


def test_it_is_dark_in_the_dark_colour_scheme(open_page):
    light, dark = screenshot(open_page(390)), screenshot(open_page(390, "dark"))
    assert np.median(light) > 240
    assert np.median(dark) < 40
