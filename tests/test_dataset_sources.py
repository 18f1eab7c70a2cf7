"""Models and data by name, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from captum_rlrp import InputError, RelevanceStatistics, cli
from captum_rlrp.dataset.files import label_numbers, load_data
from captum_rlrp.dataset.ranks import share_of_cores
from captum_rlrp.dataset.sources import Source, load_model

from .dataset_samples import write_pictures

h5py = pytest.importorskip("h5py")
pytestmark = pytest.mark.usefixtures("one_thread")
NET = "tests.dataset_samples:build"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "photos"
    write_pictures(root)
    (root / "bee" / "1.png").write_bytes(b"no picture")
    return root


def run(*arguments: object, out: Path) -> int:
    options = ["--device", "cpu", "--workers", "0", "--batch-size", "4", "--out", out]
    return cli.main(["dataset", *map(str, [*arguments, *options])])


def test_a_folder_and_a_checkpoint(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in the how-to, with a network of torchvision's."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    state = models.get_model("squeezenet1_1", weights=None, num_classes=3).state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "net.pt")
    arguments = (photos, "--model", "squeezenet1_1", "--weights", tmp_path / "net.pt")
    assert run(*arguments, "--target", "predicted,label", out=tmp_path / "run") == 0
    said = capsys.readouterr()
    assert "samples a second on 1 ranks" in said.out
    assert "1 samples skipped" in said.err
    with h5py.File(tmp_path / "run" / "attribution.h5") as file:
        assert file["attribution"].shape == (16, 3, 224, 224)
        assert file["label"][::2].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
        assert file.attrs["model_name"] == "squeezenet1_1"
    with h5py.File(tmp_path / "run" / "data.h5") as file:
        assert file["name"].asstr()[4] == ""  # the broken one
        assert file["name"].asstr()[5] == "bee/2.png"
    labels = json.loads((tmp_path / "run" / "label_map.json").read_text())
    assert [label["name"] for label in labels] == ["ant", "bee", "cat"]


def test_files_and_a_table(photos: Path, tmp_path: Path) -> None:
    files = [photos / "ant" / "0.png", photos / "cat" / "2.png"]
    assert run(*files, "--model", NET, "--pixels", 8, out=tmp_path / "a") == 0
    (photos / "list.csv").write_text("file,label\nant/0.png,1\ncat/2.png,0\n")
    assert run(photos / "list.csv", "--model", NET, "--pixels", 8, out=tmp_path / "b") == 0
    with h5py.File(tmp_path / "a" / "attribution.h5") as a:
        assert a["attribution"].shape == (2, 3, 8, 8)
        with h5py.File(tmp_path / "b" / "attribution.h5") as b:
            assert (a["attribution"][:] == b["attribution"][:]).all()
            assert b["label"][:].tolist() == [1, 0]


def test_timm(photos: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "net.pt")
    files = [photos / "ant" / "0.png", photos / "cat" / "2.png"]
    arguments = (*files, "--model", "timm/resnet10t", "--weights", tmp_path / "net.pt")
    assert run(*arguments, "--channels", "layer4", out=tmp_path / "run") == 0
    with h5py.File(tmp_path / "run" / "attribution.h5") as file:
        assert file["prediction"].shape == (2, 3)
        assert file["channels/layer4"].shape == (2, 512)


def test_text_of_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "net")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, id2label={0: "boo", 1: "yes"}, label2id={"boo": 0, "yes": 1},
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "net")
    (tmp_path / "reviews.csv").write_text("text,label\na good film,yes\nbad,boo\n")
    arguments = (tmp_path / "reviews.csv", "--model", f"hf/{tmp_path / 'net'}", "--tokens", 6)
    layer = "bert.embeddings.word_embeddings"
    assert run(*arguments, "--embedding", layer, out=tmp_path / "run") == 0
    assert run(*arguments, out=tmp_path / "same") == 0  # Hugging Face's models tell which it is
    with (
        h5py.File(tmp_path / "run" / "attribution.h5") as a,
        h5py.File(tmp_path / "same" / "attribution.h5") as b,
    ):
        assert (a["attribution"][:] == b["attribution"][:]).all()
    with h5py.File(tmp_path / "run" / "attribution.h5") as file:
        assert file["attribution"].shape == (2, 6)
        assert file["label"][:].tolist() == [1, 0]
    with h5py.File(tmp_path / "run" / "data.h5") as file:
        tokens = file["tokens"].asstr()[0].tolist()
        assert tokens == ["[CLS]", "a", "good", "film", "[SEP]", "[PAD]"]


def test_labels_mean_classes_by_name_or_by_order() -> None:
    assert label_numbers(["ant", "bee"], None) == {}
    assert label_numbers(["bee", "ant"], ["x", "y"]) == {"ant": 0, "bee": 1}
    assert label_numbers(["Great_Owl", "cat"], ["cat", "great owl", "ox"]) == {
        "Great_Owl": 1,
        "cat": 0,
    }
    assert label_numbers(["n01", "n02"], ["cat", "owl"]) == {"n01": 0, "n02": 1}
    assert label_numbers(["n01", "n02"], ["cat", "owl", "ox"]) == {}


def test_folders_that_are_no_classes_are_not_taken_for_some(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two folders, a network of three outputs that have no names."""
    for name in ("ant", "cat"):
        shutil.copytree(photos / name, tmp_path / "few" / name)
    arguments = (tmp_path / "few", "--model", NET, "--pixels", 8)
    assert run(*arguments, out=tmp_path / "a") == 0
    assert "2 labels are no class of the model (ant, cat)" in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    assert run(*arguments, "--classes", tmp_path / "names.txt", out=tmp_path / "b") == 0
    labelled = []
    for out in ("a", "b"):
        with h5py.File(tmp_path / out / "data.h5") as file:
            labelled.append(file["labelled"][:].tolist())
            labels = file["label"][:].tolist()
    assert labelled == [[False] * 6, [True] * 6]
    assert labels == [0, 0, 0, 2, 2, 2]


def test_statistics_by_the_command(photos: Path, tmp_path: Path) -> None:
    arguments = (photos, "--model", NET, "--pixels", 8)
    assert run(*arguments, "--statistics", "all", out=tmp_path / "a") == 0
    assert run(*arguments, "--statistics", "conv,pool", out=tmp_path / "b") == 0
    whole, some = (RelevanceStatistics.load(tmp_path / n / "statistics.h5") for n in "ab")
    assert whole.layers == ["input", "conv", "pool", "head"]
    assert some.layers == ["input", "conv", "pool"]
    torch.testing.assert_close(some.mean("pool"), whole.mean("pool"))


def test_cores_are_shared_among_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    for ranks, omp, threads in (("4", "1", 3), ("16", "1", 1), ("4", "5", None), ("1", "1", None)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
        assert share_of_cores() == threads


@pytest.mark.parametrize(
    ("name", "weights", "said"),
    [
        ("resnet5O", None, "Did you mean resnet50"),
        ("resnet50", "V9", "IMAGENET1K_V1"),
        ("nowhere:build", None, "module 'nowhere' cannot be imported"),
        ("tests.dataset_samples:nothing", None, "has no function 'nothing'"),
        ("tests.dataset_samples:pictures", None, "returns a Pictures, not a torch"),
        ("resnet50", None, "resnet50 needs weights .*DEFAULT"),
        ("timm/resnet10t", None, "DEFAULT or a state-dict file"),
        ("hf/some/folder", "x.pt", "brings its weights along"),
    ],
)
def test_no_such_model(name: str, weights: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_model(name, weights)


def test_weights_of_another_model(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "net.pt")
    with pytest.raises(InputError, match=r"does not fit tests.*missing keys.*unexpected keys"):
        load_model(NET, str(tmp_path / "net.pt"))


def test_no_such_data(tmp_path: Path) -> None:
    source = Source(torch.nn.Identity(), transform=lambda picture: picture)
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong.csv").write_text("path,label\na,b\n")
    for name, said in (
        ("nowhere", "There is no nowhere"),
        (str(tmp_path / "empty"), "holds no pictures"),
        (str(tmp_path / "wrong.csv"), "the column 'file'"),
        ("tests.dataset_samples:build", "not a map-style Dataset"),
    ):
        with pytest.raises(InputError, match=said):
            load_data([name], source)


def test_without_h5py(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert run("photos", "--model", NET, out=Path("never")) == 2
    assert 'pip install "captum-rlrp[dataset]"' in capsys.readouterr().err
