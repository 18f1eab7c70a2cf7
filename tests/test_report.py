"""Reports: the numbers in the page, its files, encodings, and what notebooks show."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from captum_rlrp import InputError, cli
from captum_rlrp.dataset import report as report_module
from captum_rlrp.dataset.pictures import block_sums, heat_uri
from captum_rlrp.dataset.report import build_report
from captum_rlrp.dataset.runner import explain_dataset
from captum_rlrp.dataset.show import overlay, show
from captum_rlrp.dataset.shown import Shown
from captum_rlrp.dataset.store import StorageError
from captum_rlrp.dataset.stored import StoredRun

from .dataset_samples import Pictures, build

pytest.importorskip("h5py")
pytest.importorskip("jinja2")
pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["ant", "bee", "</script><b>cat"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    explain_dataset(
        build(), Pictures(40, broken=(5,)), out, target=["predicted", "label"], layers=["pool"],
        channels=["conv"], batch_size=8, shown=Shown(NAMES), progress=False, dtype="float16",
    )  # fmt: skip
    return out


def data_of(page: Path, name: str = "report") -> Any:
    text = page.read_text("utf-8")
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.S)
    assert found is not None
    return json.loads(found[1])


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_the_page_holds_the_numbers_of_the_run(run: Path, tmp_path: Path) -> None:
    page = build_report(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    report, stored = data_of(page), StoredRun(run)
    assert report["classes"] == NAMES
    assert report["rows"]["label"] == stored.label.tolist()
    assert report["rows"]["predicted"] == stored.predicted.tolist()
    assert report["rows"]["confidence"] == pytest.approx(stored.confidence, abs=1e-4)
    assert report["rows"]["name"][10] == "6"  # two targets a sample, and sample 5 is broken
    thumbs, details = data_of(page, "chunk-thumbs-00000"), data_of(page, "chunk-detail-00000")
    picture, heat, largest, _ = thumbs[3]
    relevance = stored.rows("attribution", 3, 4)[0].sum(0)
    level = (decoded(heat).astype(float) - 128) / 127
    assert np.sign(level) * level**2 * largest == pytest.approx(relevance, abs=0.01 * largest)
    assert decoded(picture).shape == (8, 8, 3)
    assert details[3]["likeliest"][0][0] == stored.predicted[3]
    assert [name for name, _ in details[3]["flow"]] == ["input", "conv", "pool"]
    assert details[3]["layers"][0][0] == "pool"
    stored.close()


def test_accuracy_counts_a_sample_once(run: Path, tmp_path: Path) -> None:
    text = build_report(run, tmp_path).read_text("utf-8")
    stored = StoredRun(run)
    accuracy = (stored.predicted == stored.label)[::2].mean()
    stored.close()
    assert f"<dt>accuracy</dt><dd>{accuracy:.1%}</dd>" in text
    assert "<dt>samples explained</dt><dd>39</dd>" in text
    assert "image file is truncated" in text
    assert "</script><b>cat" not in text  # names are data, not markup
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)  # no network


def test_large_reports_load_their_pictures(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "INLINE", 9_000)
    build_report(run, tmp_path, limit=50)
    names = [path.name for path in sorted((tmp_path / "data").iterdir())]
    assert names == [*(f"detail-{i:05d}.js" for i in range(4)), "thumbs-00000.js"]
    text = (tmp_path / "data" / "thumbs-00000.js").read_text()
    assert text.startswith('receive("thumbs-00000",[[')
    assert len(json.loads(text[len('receive("thumbs-00000",') : -2])) == 50
    assert "first 50 are in the gallery" in (tmp_path / "index.html").read_text("utf-8")


def test_statistics_of_a_stored_run(run: Path) -> None:
    pytest.importorskip("scipy")
    stored = StoredRun(run)
    statistics = stored.statistics()
    channels = torch.tensor(stored.rows("channels/conv", 0, 78))
    target = torch.tensor(stored.target.astype(int))
    stored.close()
    some = int(target[0])
    torch.testing.assert_close(
        statistics.mean("conv", some), channels[target == some].mean(0).double(), atol=1e-6, rtol=0
    )
    assert statistics.compare("conv", some).adjusted.shape == (4,)


def test_statistics_that_the_run_kept(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    explain_dataset(
        build(), Pictures(24), tmp_path, target="label", statistics="all", progress=False
    )
    page = build_report(tmp_path)
    text = page.read_text("utf-8")
    assert "Flow of relevance through the layers" in text
    units = data_of(page)["summaries"][0]["units"]
    assert [layer for layer, _ in units] == ["input", "conv", "pool", "head"]


def test_only_reports_are_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.js").write_text("mine")
    (tmp_path / "data" / "thumbs-00009.js").write_text("of an earlier report")
    build_report(run, tmp_path)
    build_report(run, tmp_path)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine.js"]
    (tmp_path / "index.html").write_text("<h1>mine</h1>")
    with pytest.raises(StorageError, match="no report of captum_rlrp, so it is not replaced"):
        build_report(run, tmp_path)


def test_of_a_run_cut_short(run: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for name in ("run.json", "shards/000000.h5"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    text = build_report(tmp_path).read_text("utf-8")
    assert "The run is not finished" in text


def test_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run), "--out", str(tmp_path / "pages")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "pages" / "index.html")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no run.json" in capsys.readouterr().err


def test_a_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    data = TensorDataset(torch.randn(30, 4), torch.randint(2, (30,)))
    shown = Shown(["no", "yes"], feature_names=["age", "weight", "height", "score"])
    explain_dataset(model.eval(), data, tmp_path, shown=shown, batch_size=10, progress=False)
    report = data_of(build_report(tmp_path))
    assert report["kind"] == "table"
    assert report["features"][1] == "weight"
    details = data_of(tmp_path / "report" / "index.html", "chunk-detail-00000")
    sizes = [abs(entry[1]) for entry in details[0]["features"]]
    assert sizes == sorted(sizes, reverse=True)


def test_without_labels_or_inputs(tmp_path: Path) -> None:
    images = torch.stack([Pictures()[i][0] for i in range(6)])
    options = {"batch_size": 6, "progress": False, "shown": Shown(keep_inputs=False)}
    explain_dataset(build(), TensorDataset(images), tmp_path, **options)
    page = build_report(tmp_path)
    assert data_of(page)["rows"]["label"] == [-1] * 6
    assert data_of(page, "chunk-thumbs-00000")[0][0] is None
    assert "<dd>no labels</dd>" in page.read_text("utf-8")
    assert not (tmp_path / "project.yaml").exists()  # ViRelAy shows inputs


def test_out_of_order(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        build_report(run, tmp_path / "file")
    with pytest.raises(InputError, match="limit must be at least 1"):
        build_report(run, tmp_path, limit=0)


def test_blocks_keep_the_sum() -> None:
    values = np.random.default_rng(0).normal(size=(13, 20))
    small = block_sums(values, 4)
    assert small.shape == (4, 5)
    assert small.sum() == pytest.approx(values.sum())
    assert decoded(heat_uri(values * 0, 8)[0]).tolist()[0][0] == 128  # nothing is nothing


# ---- notebooks ----------------------------------------------------------------------------------


def test_images_in_a_notebook(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 8, 8)
    shown = show(torch.randn(2, 3, 8, 8), images, titles=["a <cat>", "b"])
    assert shown._repr_html_().count("data:image/png") == 2
    assert "a &lt;cat&gt;" in shown.html
    shown.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text("utf-8").startswith("<!doctype html>")
    assert show(torch.randn(1, 8, 8)).html.count("<img") == 1


def test_relevance_colours_the_picture() -> None:
    heat = np.zeros((10, 10))
    heat[2, 3], heat[5, 5] = 1.0, -1.0
    drawn = overlay(heat, torch.full((3, 10, 10), 0.5))
    assert drawn[2, 3].tolist() == [0xD5, 0x5E, 0]
    assert drawn[5, 5].tolist() == [0, 0x72, 0xB2]
    assert abs(drawn[0, 0].astype(int) - 128).max() <= 1


def test_text_in_a_notebook() -> None:
    shown = show(torch.tensor([0.5, -1.0, 0.0]), tokens=["good", "b<ad", "film"])
    assert "solid" in shown.html.split("good")[0]
    assert "dotted" in shown.html.split("b&lt;ad")[0]
    assert show(torch.randn(2, 3, 5), tokens=[["a"] * 3] * 2).html.count("<p") == 2


def test_what_cannot_be_shown() -> None:
    for attributions, options, said in (
        (torch.rand(3), {}, "pass tokens too"),
        (torch.rand(2, 3, 8, 8), {"images": torch.rand(2, 3, 4, 4)}, "do not fit"),
        (torch.rand(2, 3), {"tokens": [["a"]]}, "2 explanations and 1 texts"),
        (torch.rand(1, 2), {"tokens": [["a", "b", "c"]]}, "3 tokens and 2 relevances"),
        (torch.rand(2, 3, 8, 8), {"titles": ["a"]}, "1 titles"),
    ):
        with pytest.raises(InputError, match=said):
            show(attributions, **options)
