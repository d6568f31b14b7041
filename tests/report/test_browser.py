"""The page in a real browser: it draws, sorts, picks and reads, without an error and without leaving itself."""

import json
import shutil

import pytest

import attnscope
from attnscope.report import write_report
from attnscope.runs.reader import open_run

pytestmark = pytest.mark.browser

HOSTILE = "<img src=x onerror=alert(1)>"
CONFIG = {
    "model": {"d_model": 32, "n_layers": 2, "n_heads": 2, "seq_len": 16},
    "data": {"source": "stdlib", "batch_size": 4},
    "optimizer": {"lr": 0.05},
    "train": {"steps": 60},
    "sweep": {
        "vary": {
            "attention": {"scale": ["inverse_sqrt", "none"]},
            "init": {"gain": [0.5, 1.0, 3.0]},
        },
        "seeds": 2,
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The report of a real sweep, one of whose members somebody has renamed."""
    run = attnscope.train_model(CONFIG, path=tmp_path_factory.mktemp("runs") / "swept")
    manifest = run.path / "run.json"
    raw = json.loads(manifest.read_text())
    raw["members"][0]["name"] = HOSTILE
    manifest.write_text(json.dumps(raw))
    return write_report(open_run(run.path))


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("chromium-browser")
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture(params=[("light", 1280), ("dark", 1280), ("light", 400)], ids=str)
def page(browser, place, request):
    """The page, which fails the test if it says, asks for or pops up anything."""
    scheme, width = request.param
    opened = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    trouble = []
    opened.on("console", lambda message: trouble.append(f"{message.type}: {message.text}"))
    opened.on("pageerror", lambda error: trouble.append(str(error)))
    opened.on("dialog", lambda dialog: trouble.append(dialog.message) or dialog.dismiss())
    opened.on(
        "request",
        lambda request: request.url.startswith(("file://", "data:")) or trouble.append(request.url),
    )
    opened.goto(place.as_uri())
    yield opened
    assert trouble == []
    opened.close()


def test_every_figure_is_visible(page):
    pictures = page.locator("figure img")
    assert pictures.count() >= 9
    for picture in pictures.all():
        picture.scroll_into_view_if_needed()
        size = picture.evaluate("image => [image.naturalWidth, image.naturalHeight, image.width]")
        assert min(size) > 100, picture.get_attribute("alt")


def test_nothing_is_wider_than_the_window(page):
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0


def test_a_hostile_name_is_text(page):
    assert page.locator("#members td", has_text=HOSTILE).count() == 1
    assert page.locator("#picked label", has_text=HOSTILE).count() == 1
    assert page.locator("img[src='x']").count() == 0


def column(page, place):
    cells = page.locator(f"#members tbody tr td:nth-child({place})").all_text_contents()
    return [float(cell) if cell not in ("-", "nan") else None for cell in cells]


def test_a_table_sorts_by_mouse_and_by_keyboard(page):
    header = page.locator("#members th", has_text="first loss")
    before = column(page, 4)
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert column(page, 4) == sorted(before) != before
    header.locator("button").press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert column(page, 4) == sorted(before, reverse=True)
    page.locator("#members th button", has_text="member").press("Space")
    names = page.locator("#members tbody tr td:first-child").all_text_contents()
    assert names == page.evaluate("names => [...names].sort((a, b) => a.localeCompare(b, 'en'))", names)
    assert header.get_attribute("aria-sort") is None


def test_what_is_no_number_stands_last_both_ways(page):
    button = page.locator("#members th", has_text="final loss").locator("button")
    for _ in range(2):
        button.click()
        known = [value is not None for value in column(page, 6)]
        assert known == sorted(known, reverse=True) and not all(known)


def paths(page):
    return page.locator("#plot path").evaluate_all("all => all.map(each => each.getAttribute('d'))")


def test_members_quantities_and_heads_can_be_picked(page):
    assert len(paths(page)) == 4
    page.locator("#picked input").nth(5).check()
    assert len(paths(page)) == 5
    loss = paths(page)
    assert page.locator("#head").is_disabled()
    page.locator("#quantity").select_option(label="entropy_ratio (0 to 1)")
    mean = paths(page)
    assert mean != loss
    page.locator("#head").select_option(label="1.0")
    one = paths(page)
    page.locator("#head").select_option(label="0.1")
    assert len({*map(tuple, (mean, one, paths(page)))}) == 3


def test_values_can_be_read_by_mouse_and_by_keyboard(page, place):
    plot, reading = page.locator("#plot"), page.locator("#reading")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2)
    assert reading.text_content().startswith("step ")
    assert reading.text_content().count("■") == 4
    plot.press("Home")
    first = reading.text_content()
    run = open_run(place.parent.parent)
    loss = run.steps[(run.steps["member"] == HOSTILE) & (run.steps["step"] == 0)]["loss"].item()
    assert first.startswith("step 0 ") and f"{HOSTILE}: {float(f'{loss:.3g}'):g}" in first
    plot.press("ArrowRight")
    assert reading.text_content() != first


def test_dark_is_dark_and_figures_stay_on_light(page):
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")

    def brightness(selector):
        colour = page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).backgroundColor")
        return sum(int(part) for part in colour.strip("rgb()").split(",")[:3]) / 3

    assert (brightness("body") < 60) is dark
    assert brightness("figure img") > 200


def test_print_shows_whole_tables(page):
    page.emulate_media(media="print")
    assert page.locator("#explorer").is_hidden()
    assert page.locator(".table").first.evaluate("each => getComputedStyle(each).overflowX") == "visible"
