"""The command line: results on real files, and one clear line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from captum_rlrp import RelativeLRP, cli
from captum_rlrp.cli import read_image
from captum_rlrp.dataset.sources import number_of_outputs, plain_key

from .dataset_samples import build, write_pictures

pytest.importorskip("h5py")
pytest.importorskip("jinja2")
models = pytest.importorskip("torchvision.models")
ARCH = "squeezenet1_1"  # the smallest there is


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state-dict file with three classes, as DataParallel and most training scripts save it."""
    torch.manual_seed(0)
    model = models.get_model(ARCH, weights=None, num_classes=3)
    path = tmp_path_factory.mktemp("weights") / "net.pt"
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, path)
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 256, (260, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def explain(*arguments: object, out: Path) -> int:
    return cli.main(["explain", *map(str, arguments), "--out", str(out), "--device", "cpu"])


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


def test_writes_a_heatmap_and_a_report_per_image(
    image: Path, weights: Path, tmp_path: Path
) -> None:
    twin = tmp_path / image.name
    twin.write_bytes(image.read_bytes())
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\n")

    assert (
        explain(
            image,
            twin,
            "--arch",
            ARCH,
            "--weights",
            weights,
            "--classes",
            names,
            out=tmp_path / "out",
        )
        == 0
    )

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "index.html",
        "noise-2.json",
        "noise-2.png",
        "noise.json",
        "noise.png",
    ]
    report = json.loads((tmp_path / "out" / "noise.json").read_text())
    assert report["image"] == str(image)
    assert report["class_name"] == ["ant", "bee", "cat"][report["target"]]
    assert report["target"] == report["predictions"][0]["target"]
    assert report["logit"] == max(entry["logit"] for entry in report["predictions"])
    assert sum(entry["probability"] for entry in report["predictions"]) == pytest.approx(1)
    assert 0 < report["sum_abs_relevance"] <= 1 + 1e-4
    assert report["delta"] < 1e-4
    with Image.open(tmp_path / "out" / report["heatmap"]) as heatmap:
        assert min(heatmap.size) > 200


def test_explains_the_target_asked_for(image: Path, weights: Path, tmp_path: Path) -> None:
    assert explain(image, "--arch", ARCH, "--weights", weights, "--target", 2, out=tmp_path) == 0
    report = json.loads((tmp_path / "noise.json").read_text())
    assert report["target"] == 2
    assert report["class_name"] is None


@pytest.mark.parametrize("target", [3, -1])
def test_target_out_of_range(
    target: int, image: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = explain(image, "--arch", ARCH, "--weights", weights, f"--target={target}", out=tmp_path)
    assert code == 2
    assert "3 outputs, 0 to 2" in the_error(capsys)


def test_corrupt_image_costs_only_itself(
    image: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_image, cut = tmp_path / "text.png", tmp_path / "cut.png"
    no_image.write_text("no picture")
    cut.write_bytes(image.read_bytes()[:5000])
    code = explain(no_image, cut, image, "--arch", ARCH, "--weights", weights, out=tmp_path / "o")
    assert code == 2
    errors = capsys.readouterr().err
    assert f"{no_image} is not an image" in errors
    assert f"{cut} cannot be read" in errors
    names = ["index.html", "noise.json", "noise.png"]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == names


def test_not_one_image_can_be_read(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    arguments = (tmp_path / "text.png", "--arch", ARCH, "--weights", weights)
    assert explain(*arguments, out=tmp_path / "o") == 2
    assert "text.png is not an image" in the_error(capsys)
    assert not list((tmp_path / "o").iterdir())


def test_missing_image(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("nowhere.png", "--arch", ARCH, "--weights", weights, out=tmp_path) == 2
    assert "There is no nowhere.png" in the_error(capsys)


def test_unknown_architecture(
    image: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(image, "--arch", "resnet5O", "--weights", weights, out=tmp_path) == 2
    assert "Did you mean resnet50" in the_error(capsys)


def test_unknown_weights(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(image, "--arch", ARCH, "--weights", "V9", out=tmp_path) == 2
    assert "IMAGENET1K_V1" in the_error(capsys)


def test_state_dict_of_another_network(
    image: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(image, "--arch", "squeezenet1_0", "--weights", weights, out=tmp_path) == 2
    message = the_error(capsys)
    assert "does not fit squeezenet1_0" in message
    assert "features.0.weight is (64, 3, 3, 3) instead of (96, 3, 7, 7)" in message


def test_state_dict_with_a_key_too_few_and_one_too_many(
    image: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(weights)["state_dict"]
    state["module.extra"] = state.pop("module.features.0.bias")
    torch.save(state, tmp_path / "net.pt")
    assert explain(image, "--arch", ARCH, "--weights", tmp_path / "net.pt", out=tmp_path) == 2
    message = the_error(capsys)
    assert "1 missing keys (features.0.bias)" in message
    assert "1 unexpected keys (extra)" in message


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", [1, 2], {"lr": 0.1}, torch.nn.Linear(2, 2)]
)
def test_file_that_holds_no_state_dict(
    content: object, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert explain(image, "--arch", ARCH, "--weights", path, out=tmp_path) == 2
    assert str(path) in the_error(capsys)


def test_wrong_number_of_class_names(
    image: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("ant\n")
    arguments = (image, "--arch", ARCH, "--weights", weights, "--classes", names)
    assert explain(*arguments, out=tmp_path) == 2
    assert "names 1 classes; the network has 3" in the_error(capsys)


def test_device_that_is_not_there(
    image: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["explain", str(image), "--arch", ARCH, "--weights", str(weights)]
    assert cli.main([*arguments, "--out", str(tmp_path), "--device", "cuda:99"]) == 2
    assert "'cuda:99' cannot be used" in the_error(capsys)


@pytest.mark.parametrize(
    "arch",
    [
        "alexnet",
        "convnext_tiny",
        "densenet121",
        "efficientnet_b0",
        "googlenet",
        "inception_v3",
        "maxvit_t",
        "mnasnet0_5",
        "mobilenet_v3_small",
        "resnet18",
        "shufflenet_v2_x0_5",
        "squeezenet1_0",
        "swin_t",
        "swin_v2_t",
        "vgg11_bn",
        "vit_b_16",
    ],  # one of each family; regnet computes with tensors in its constructor
)
def test_number_of_classes_of_every_family(arch: str) -> None:
    extras = {"init_weights": False} if arch in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        model = models.get_model(arch, weights=None, num_classes=7, **extras)
    assert number_of_outputs(model.state_dict()) == 7


def test_old_names_of_densenet() -> None:
    old = "module.features.denseblock1.denselayer2.norm.1.weight"
    assert plain_key(old) == "features.denseblock1.denselayer2.norm1.weight"
    assert plain_key("features.norm0.weight") == "features.norm0.weight"


def test_doctor_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "backend" in printed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.startswith("captum-rlrp ")


# ---- explain takes what dataset takes -----------------------------------------------------------

NET = "tests.dataset_samples:build"


def test_explains_a_model_of_ones_own_in_batches(tmp_path: Path) -> None:
    """Numbers of each picture alone, though three went through together; and the page."""
    write_pictures(tmp_path / "in", per_class=1)
    files = sorted((tmp_path / "in").rglob("*.png"))
    options = ["--model", NET, "--pixels", 8, "--batch-size", 2, "--target", "1,predicted"]
    assert explain(*files, *options, out=tmp_path / "out") == 0
    reports = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*.json"))]
    assert len(reports) == 6
    model = build()
    for report in reports:
        with Image.open(report["image"]) as opened:
            image = ImageOps.fit(opened.convert("RGB"), (8, 8))
        x = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 255
        scores = model(x)[0]
        assert report["logit"] == pytest.approx(scores[report["target"]].item(), rel=1e-5)
        relevance = RelativeLRP(model).attribute(x, target=report["target"])
        assert report["sum_abs_relevance"] == pytest.approx(relevance.abs().sum().item(), rel=1e-4)
    assert sum(report["target"] == 1 for report in reports) >= 3
    assert (tmp_path / "out" / "index.html").read_text("utf-8").count("data:image/png") >= 12


def test_explains_samples_that_are_no_files(tmp_path: Path) -> None:
    assert explain("tests.dataset_samples:pictures", "--model", NET, out=tmp_path / "out") == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["index.html"]  # 5 is broken


def test_replaces_no_file_that_is_not_its_own(
    image: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "noise.json").write_text('{"mine": 1}')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.js").write_text("mine")
    arguments = (image, "--arch", ARCH, "--weights", weights)
    for _ in range(2):  # the second time it replaces what the first wrote
        assert explain(*arguments, out=tmp_path) == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            *("data", "index.html", "noise-2.json", "noise-2.png", "noise.json"),
        ]
    assert (tmp_path / "noise.json").read_text() == '{"mine": 1}'
    assert (tmp_path / "data" / "notes.js").read_text() == "mine"
    (tmp_path / "index.html").write_text("my homepage")
    capsys.readouterr()
    assert explain(*arguments, out=tmp_path) == 2
    assert "index.html is there and no report of captum_rlrp" in the_error(capsys)
    assert (tmp_path / "index.html").read_text() == "my homepage"


def test_a_grey_picture_of_16_bits_is_not_white(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / "scan.png")
    read = np.asarray(read_image(tmp_path / "scan.png"))
    assert read[..., 0].tolist() == np.rint(levels / 257).astype(int).tolist()
