"""The report's pictures: ``python -m docs.figures.report`` draws them, with Chromium installed.

Photographs that come with scikit-image and scikit-learn, whole and in crops, on EfficientNet-Lite0.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from torchvision.models import ResNet50_Weights
from torchvision.transforms import v2

from captum_rlrp import cli
from evaluation import real
from evaluation.gallery import PHOTOGRAPHS, photograph

IMAGES = Path(__file__).resolve().parent.parent / "images"


def network() -> tuple[torch.nn.Module, v2.Transform]:
    """What ``--model`` names: the network and how its pictures are prepared."""
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    return real.efficientnet_lite0(), v2.Compose([to_tensor, v2.Normalize([0.5] * 3, [0.5] * 3)])


def write_photographs(folder: Path) -> None:
    """Each as it is, and its middle enlarged."""
    folder.mkdir()
    pictures = {name: photograph(*entry[:2]) for name, entry in PHOTOGRAPHS.items()}
    for name, pixels in (pictures | {"camera": cameraman()}).items():
        picture: Image.Image = v2.ToPILImage()(pixels)
        for part, box in {"": (0, 0, 224, 224), "-middle": (36, 36, 188, 188)}.items():
            picture.crop(box).resize((224, 224), Image.Resampling.BICUBIC).save(
                folder / f"{name}{part}.png"
            )


def cameraman() -> torch.Tensor:
    """A photograph without colours."""
    from skimage import data

    pixels = torch.tensor(data.camera()).float() / 255
    return v2.Resize(224, antialias=True)(pixels.expand(3, -1, -1))


def save(screenshot: bytes, name: str) -> None:
    """With 256 colours, which is a third of the bytes."""
    Image.open(BytesIO(screenshot)).convert("RGB").quantize(256).save(IMAGES / name, optimize=True)


def shoot(report: Path) -> None:
    """The gallery and one sample as the browser shows them."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 630})
        page.goto(report.as_uri() + "#gallery")
        page.wait_for_timeout(2000)
        save(page.screenshot(), "report-gallery.png")
        page.set_viewport_size({"width": 1000, "height": 610})
        page.locator("a:visible", has_text="Egyptian cat").first.click()
        page.wait_for_selector("#sample canvas")
        page.wait_for_timeout(2000)
        save(page.screenshot(), "report-sample.png")
        browser.close()


def main() -> None:
    module = sys.modules["efficientnet"] = ModuleType("efficientnet")  # a short name for the title
    module.lite0 = network
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder / "photos")
        classes = folder / "classes.txt"
        classes.write_text("\n".join(ResNet50_Weights.DEFAULT.meta["categories"]))
        run = str(folder / "run")
        cli.main([
            "dataset", str(folder / "photos"), "--model", "efficientnet:lite0",
            "--classes", str(classes), "--layers", "_blocks.3,_blocks.10", "--batch-size", "4",
            "--out", run,
        ])  # fmt: skip
        cli.main(["report", run])
        shoot(folder / "run" / "report" / "index.html")


if __name__ == "__main__":
    main()
