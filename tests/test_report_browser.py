"""The report in a real browser: Debian's Chromium, driven by Playwright's library."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from captum_rlrp.dataset import report as report_module
from captum_rlrp.dataset.report import build_report
from captum_rlrp.dataset.runner import explain_dataset
from captum_rlrp.dataset.shown import Shown

from .dataset_samples import Pictures, Reader, build

pytest.importorskip("h5py")
pytest.importorskip("jinja2")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
if CHROMIUM is None:
    pytest.skip("no chromium here (Debian: apt-get install chromium), so the report was not "
                "opened in a browser", allow_module_level=True)  # fmt: skip
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="no playwright here, so the report was not opened in a browser"
)
expect = sync_api.expect
WAIT = 60_000  # ms, for a busy machine
expect.set_options(timeout=WAIT)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    explain_dataset(
        build(), Pictures(120), out, target="label", layers=["pool"], statistics="all",
        batch_size=40, shown=Shown(["ant", "bee", "cat"]), progress=False,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


class Visit:
    """A page, and what went wrong on it."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.page = browser.new_context(**options).new_page()
        self.page.set_default_timeout(WAIT)
        self.trouble: list[str] = []
        self.page.on(
            "console", lambda m: self.trouble.append(m.text) if m.type == "error" else None
        )
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("request", self._no_network)

    def _no_network(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            self.trouble.append(f"asked for {request.url}")

    def open(self, path: Path, view: str = "") -> Any:
        self.page.goto(path.as_uri() + view)
        return self.page


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    made = Visit(browser)
    yield made
    assert made.trouble == []
    made.page.context.close()


def pixels(page: Any, unlike: list[int] | None = None) -> list[int]:
    """Of the first heat map, once it is drawn, and not as it was before."""
    drawn = page.wait_for_function(
        "unlike => { const c = document.querySelector('canvas');"
        "if (!(c?.width > 1)) return null;"
        "const now = [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data];"
        "return now.some(v => v) && String(now) !== String(unlike) ? now : null; }",
        arg=unlike,
    )
    return drawn.json_value()


# Links change the address, and the page follows when it is told: expect waits, inner_text does not.
def test_open_filter_move_follow(run: Path, tmp_path: Path, visit: Visit) -> None:
    page = visit.open(build_report(run, tmp_path))
    found = page.locator("#found")
    expect(page.locator("#view-overview h2")).to_have_text("Overview")
    expect(page.locator("svg")).to_have_count(4)  # three of all samples, and the flow
    page.click("text=Gallery")
    expect(found).to_have_text("120 of 120, page 1 of 3")
    expect(page.locator("#grid li")).to_have_count(48)

    page.select_option("#by", "label")
    page.select_option("#class", label="bee")
    expect(found).to_have_text("40 of 120")
    page.select_option("#judged", "wrong")
    expect(found).not_to_have_text("40 of 120")
    few = int(found.inner_text().split()[0])
    page.select_option("#judged", "right")
    expect(found).to_have_text(f"{40 - few} of 120")
    page.fill("#search", "no such name")
    expect(found).to_have_text("0 of 120")
    page.click("#filters button")
    expect(found).to_have_text("120 of 120, page 1 of 3")

    before = pixels(page)
    page.fill("#opacity", "0")
    without = pixels(page, unlike=before)
    page.fill("#opacity", "100")
    page.fill("#contrast", "20")
    strong = pixels(page, unlike=without)
    page.select_option("#sign", "against")
    against = pixels(page, unlike=strong)
    assert len({tuple(p) for p in (before, without, strong, against)}) == 4

    page.click("#grid li:nth-child(3) a")
    expect(page).to_have_url(re.compile("#sample=2$"))
    expect(page.locator("#sample")).to_contain_text("Explained")
    expect(page.locator("#sample canvas")).to_have_count(2)  # the input and a layer

    page.click("text=Classes")
    expect(page.locator("#compared canvas")).to_have_count(3)  # two means and their difference
    page.select_option("#layer", "pool")
    page.wait_for_selector("#compared >> text=Apart from all others: pool")
    page.select_option("#layer", "head")
    page.wait_for_selector("#compared >> text=Apart from all others: head")
    expect(page.locator("#class-table tr")).to_have_count(4)


def test_by_keyboard(run: Path, tmp_path: Path, visit: Visit) -> None:
    page = visit.open(build_report(run, tmp_path))
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("g")
    expect(page.locator("#found")).to_contain_text("page 1")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#found")).to_contain_text("page 2")
    page.locator("#grid a").first.focus()
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("#sample=48$"))
    expect(page.locator("#next")).to_have_attribute("href", "#sample=49")
    page.keyboard.press("ArrowRight")
    expect(page).to_have_url(re.compile("#sample=49$"))
    expect(page.locator("#sample-name")).to_have_text("49")
    page.keyboard.press("Escape")
    expect(page).to_have_url(re.compile(r"#gallery\?page=1$"))
    expect(page.locator("#view-gallery")).to_be_visible()
    page.keyboard.press("/")
    expect(page.locator("#search")).to_be_focused()


def test_dark_and_on_a_phone(run: Path, tmp_path: Path, browser: Any) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "has_touch": True}
    visit = Visit(browser, **phone)
    path = build_report(run, tmp_path)
    for view, part in {
        "": "#view-overview svg",
        "#gallery": "#grid canvas",
        "#sample=1": "#sample canvas",
        "#classes": "#compared canvas",
    }.items():
        page = visit.open(path, view)
        expect(page.locator(part).first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, view
    red, green, blue = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    )
    assert max(red, green, blue) < 60
    assert visit.trouble == []


def test_pictures_in_files_are_loaded(
    run: Path, tmp_path: Path, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "INLINE", 0)
    page = visit.open(build_report(run, tmp_path), "#gallery?page=2")
    assert pixels(page)
    page.goto(page.url.split("#")[0] + "#sample=100")
    page.wait_for_selector("#sample canvas")


def test_text(tmp_path: Path, visit: Visit) -> None:
    torch.manual_seed(0)
    tokens, words = torch.randint(1, 10, (6, 7)), [f"word{i}" for i in range(10)]

    class Texts(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> Any:
            return (tokens[i], torch.ones(7)), i % 2

    shown = Shown(["bad", "good"], words=lambda row: [words[i] for i in row])
    explain_dataset(Reader().eval(), Texts(), tmp_path, shown=shown, batch_size=6, progress=False)
    page = visit.open(build_report(tmp_path), "#sample=0")
    page.wait_for_selector("#sample .tokens span")
    spans = page.locator("#sample .tokens span")
    assert spans.all_inner_texts() == [words[i] for i in tokens[0]]
    assert page.locator("#sample .tokens .for, #sample .tokens .against").count() > 0
    page.set_viewport_size({"width": 330, "height": 700})  # the words wrap
    assert page.evaluate("document.documentElement.scrollWidth") <= 330
