"""The report in a real browser: Debian's Chromium, driven by Playwright's library."""

from __future__ import annotations

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
        self.page.set_default_timeout(8_000)
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


def pixels(page: Any) -> list[int]:
    """Of the first heat map, once it is drawn."""
    page.wait_for_function("document.querySelector('canvas')?.width > 1")
    page.wait_for_timeout(150)
    return page.evaluate(
        "(() => { const c = document.querySelector('canvas');"
        "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
    )


def test_open_filter_move_follow(run: Path, tmp_path: Path, visit: Visit) -> None:
    page = visit.open(build_report(run, tmp_path))
    assert page.inner_text("#view-overview h2") == "Overview"
    assert page.locator("svg").count() == 4  # three of all samples, and the flow
    page.click("text=Gallery")
    assert page.inner_text("#found") == "120 of 120, page 1 of 3"
    assert page.locator("#grid li").count() == 48

    page.select_option("#by", "label")
    page.select_option("#class", label="bee")
    assert page.inner_text("#found") == "40 of 120"
    page.select_option("#judged", "wrong")
    few = int(page.inner_text("#found").split()[0])
    page.select_option("#judged", "right")
    assert few + int(page.inner_text("#found").split()[0]) == 40
    page.fill("#search", "no such name")
    assert page.inner_text("#found") == "0 of 120"
    page.click("#filters button")
    page.wait_for_function("document.getElementById('found').textContent.startsWith('120')")

    before = pixels(page)
    page.fill("#opacity", "0")
    without = pixels(page)
    page.fill("#opacity", "100")
    page.fill("#contrast", "20")
    strong = pixels(page)
    page.select_option("#sign", "against")
    assert len({tuple(p) for p in (before, without, strong, pixels(page))}) == 4

    page.click("#grid li:nth-child(3) a")
    assert page.url.endswith("#sample=2")
    page.wait_for_selector("#sample canvas")
    assert "Explained" in page.inner_text("#sample")
    assert page.locator("#sample canvas").count() == 2  # the input and a layer

    page.click("text=Classes")
    three = "document.querySelectorAll('#compared canvas').length === 3"
    page.wait_for_function(three)  # two means and their difference
    page.select_option("#layer", "pool")
    page.wait_for_selector("#compared >> text=Apart from all others: pool")
    page.select_option("#layer", "head")
    page.wait_for_selector("#compared >> text=Apart from all others: head")
    assert page.locator("#class-table tr").count() > 1


def test_by_keyboard(run: Path, tmp_path: Path, visit: Visit) -> None:
    page = visit.open(build_report(run, tmp_path))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("g")
    page.wait_for_selector("#grid li")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.getElementById('found').textContent.includes('page 2')")
    page.focus("#grid a")
    page.keyboard.press("Enter")
    page.wait_for_function("location.hash === '#sample=48'")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("location.hash === '#sample=49'")
    page.keyboard.press("Escape")
    page.wait_for_function("location.hash === '#gallery?page=1'")
    page.keyboard.press("/")
    page.wait_for_function("document.activeElement.id === 'search'")


def test_dark_and_on_a_phone(run: Path, tmp_path: Path, browser: Any) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "has_touch": True}
    visit = Visit(browser, **phone)
    path = build_report(run, tmp_path)
    for view in ("", "#gallery", "#sample=1", "#classes"):
        page = visit.open(path, view)
        page.wait_for_timeout(100)
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
