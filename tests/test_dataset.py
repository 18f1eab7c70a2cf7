"""Explaining a data set: what is stored, going on where a run stopped, faults."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from captum_rlrp import InputError, LayerRelativeLRP, RelativeLRP, RelevanceStatistics
from captum_rlrp.dataset.runner import explain_dataset
from captum_rlrp.dataset.shown import Shown
from captum_rlrp.dataset.store import Run, StorageError, merge
from captum_rlrp.dataset.stored import StoredRun

from .dataset_samples import CLASSES, Pictures, Reader, build, write_pictures

h5py = pytest.importorskip("h5py")
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


def explain(out: Path, dataset: Any = None, **options: Any) -> Path:
    options = {"batch_size": 4, "shard_size": 8, "progress": False} | options
    return explain_dataset(build(), Pictures() if dataset is None else dataset, out, **options)


def shards(out: Path) -> dict[str, bytes]:
    """Every array of every shard. Not the files' bytes: LZF packs the same values in many ways."""
    found: dict[str, bytes] = {}
    for path in sorted((out / "shards").iterdir()):
        found |= arrays(path)
    return found


def arrays(path: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            value = item[()]
            content = repr(value.tolist()).encode() if item.dtype == object else value.tobytes()
            found[f"{path.name}:{name}"] = repr((item.shape, item.dtype)).encode() + content

    with h5py.File(path) as file:
        file.visititems(note)
        found[path.name] = repr(sorted(file.attrs.items())).encode()
    return found


# ---- what is stored -----------------------------------------------------------------------------


def test_rows_are_the_explanations_of_the_samples(tmp_path: Path) -> None:
    path = explain(tmp_path)
    images = torch.stack([Pictures()[i][0] for i in range(22)])
    scores = build()(images).detach()
    predicted = scores.argmax(1)
    expected = RelativeLRP(build()).attribute(images, target=predicted)
    with h5py.File(path) as file:
        torch.testing.assert_close(torch.tensor(file["attribution"][:]), expected)
        torch.testing.assert_close(torch.tensor(file["prediction"][:]), scores)
        assert file["index"][:].tolist() == list(range(22))
        assert file["label"][:].tolist() == [i % CLASSES for i in range(22)]
        assert file["target"][:].tolist() == predicted.tolist()
        assert file["label"].dtype == "uint16"
        assert file["mass/input"][:] == pytest.approx(expected.abs().sum((1, 2, 3)).numpy())
        assert file["delta"][:].max() < 1e-4
        assert file.attrs["complete"]
        assert len(file.attrs["weights_sha256"]) == 64
        assert json.loads(file.attrs["versions"])["torch"] == torch.__version__
        assert file.attrs["samples_per_second"] > 0
        assert 0 <= file.attrs["share_waiting_for_data"] <= 1
    with h5py.File(tmp_path / "data.h5") as file:
        assert file["data"].dtype == "uint8"
        assert abs(file["data"][3] / 255 - images[3].numpy()).max() < 0.003


def test_several_targets_layers_and_channels(tmp_path: Path) -> None:
    path = explain(
        tmp_path, target=["label", 1], layers=["pool"], channels=["conv", "pool"], dtype="float16"
    )
    model = build()
    images = torch.stack([Pictures()[i][0] for i in range(22)])
    with h5py.File(path) as file:
        assert file["index"][:6].tolist() == [0, 0, 1, 1, 2, 2]
        assert file["target"][:6].tolist() == [0, 1, 1, 1, 2, 1]
        ones = slice(1, None, 2)
        conv, pool = LayerRelativeLRP(model, [model.conv, model.pool]).attribute(images, target=1)
        for name, value in (
            ("attribution", RelativeLRP(model).attribute(images, target=1)),
            ("layers/pool", pool),
            ("channels/conv", conv.sum((2, 3))),
            ("channels/pool", pool.sum((2, 3))),
        ):
            stored = torch.tensor(file[name][ones]).float() / file[name].attrs["scale"]
            torch.testing.assert_close(stored, value, rtol=1e-3, atol=1e-8)
        assert "layers/conv" not in file


def test_tokens_are_explained_at_the_embedding(tmp_path: Path) -> None:
    tokens = torch.randint(1, 10, (5, 7))
    mask = torch.ones(5, 7)
    mask[:, 5:] = 0
    model = Reader().eval()

    class Texts(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, i: int) -> Any:
            return (tokens[i], mask[i]), i % 2

    words = ["pad", "a", "good", "bad", "film", "plot", "very", "not", "was", "dull"]
    shown = Shown(["bad", "good"], words=lambda row: [words[i] for i in row])
    path = explain_dataset(
        model, Texts(), tmp_path, target=1, batch_size=3, shown=shown, progress=False
    )
    expected = LayerRelativeLRP(model, model.embedding).attribute(tokens, 1, (mask,)).sum(2)
    with h5py.File(path) as file:
        torch.testing.assert_close(torch.tensor(file["attribution"][:]), expected)
    with h5py.File(tmp_path / "data.h5") as file:
        assert file["tokens"].asstr()[0].tolist() == [words[i] for i in tokens[0]]


def test_statistics_are_those_of_the_stored_rows(tmp_path: Path) -> None:
    """Against NumPy, over several shards, with a sample that is skipped and two targets."""
    path = explain(tmp_path, Pictures(broken=(5,)), target=["predicted", "label"],
                   layers=["conv", "pool"], statistics="all")  # fmt: skip
    kept = StoredRun(tmp_path).statistics()
    assert kept.layers == ["input", "conv", "pool", "head"]
    assert kept.edges == [("input", "conv"), ("conv", "pool"), ("pool", "head")]
    with h5py.File(path) as file:
        assert not [name for name in file if name.startswith("statistics")]
        classes = file["target"][:]
        assert kept.counts == {n: int((classes == n).sum()) for n in np.unique(classes)}
        for layer, key in (("input", "attribution"), ("conv", "layers/conv")):
            for of in (None, int(classes[1])):
                rows = file[key][:].astype(float)[classes == of if of is not None else slice(None)]
                units = rows.sum((2, 3))
                assert kept.mean(layer, of).numpy() == pytest.approx(units.mean(0), abs=1e-9)
                error = units.std(0, ddof=1) / len(units) ** 0.5
                assert kept.standard_error(layer, of).numpy() == pytest.approx(error, rel=1e-5)
                assert kept.mass(layer, of) == pytest.approx(abs(rows).sum((1, 2, 3)).mean())


def test_statistics_of_some_layers_and_on_disk(tmp_path: Path) -> None:
    explain(tmp_path, statistics=["pool"], channels=["conv"])
    kept = RelevanceStatistics.load(tmp_path / "statistics.h5")
    assert kept.layers == ["input", "conv", "pool"]
    images = torch.stack([Pictures()[i][0] for i in range(22)])
    collected = RelevanceStatistics.collect(build(), [images])
    for layer in kept.layers:
        torch.testing.assert_close(kept.mean(layer), collected.mean(layer), rtol=1e-4, atol=1e-8)
        assert kept.effective_units(layer) == pytest.approx(collected.effective_units(layer), 1e-4)


def test_channels_of_a_transformer_lie_last(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2)).eval()
    x = torch.randn(5, 3, 4)
    path = explain_dataset(
        model, TensorDataset(x), tmp_path, channels=["0"], unit_dim=-1, target=1, progress=False
    )
    expected = LayerRelativeLRP(model, model[0]).attribute(x, target=1).sum(1)
    with h5py.File(path) as file:
        torch.testing.assert_close(torch.tensor(file["channels/0"][:]), expected)


def test_statistics_of_a_vision_transformer(tmp_path: Path) -> None:
    """Tokens have their channels last; the picture and the convolution that cuts it, first."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.VisionTransformer(16, 8, 2, 2, 12, 20, num_classes=3).eval()
    x = torch.rand(4, 3, 16, 16)
    path = explain_dataset(model, TensorDataset(x), tmp_path, statistics="all", unit_dim=-1,
                           channels=["conv_proj"], target=1, progress=False)  # fmt: skip
    kept = StoredRun(tmp_path).statistics()
    block = model.encoder.layers.encoder_layer_1.ln_2
    name = "encoder.layers.encoder_layer_1.ln_2"
    patches, tokens = LayerRelativeLRP(model, [model.conv_proj, block]).attribute(x, target=1)
    with h5py.File(path) as file:
        stored = torch.tensor(file["channels/conv_proj"][:])
    torch.testing.assert_close(stored, patches.sum((2, 3)))
    for layer, expected in (
        ("input", RelativeLRP(model).attribute(x, target=1).sum((2, 3))),
        ("conv_proj", patches.sum((2, 3))),
        (name, tokens.sum(1)),
    ):
        mean = expected.mean(0).double()
        torch.testing.assert_close(kept.mean(layer), mean, rtol=1e-4, atol=1e-8)


def test_files_that_virelay_opens(tmp_path: Path) -> None:
    explain(tmp_path, shown=Shown(["ant", "bee", "cat"]))
    labels = json.loads((tmp_path / "label_map.json").read_text())
    assert labels[1] == {"index": 1, "word_net_id": "00000001", "name": "bee"}
    project = (tmp_path / "project.yaml").read_text()
    assert "path: data.h5" in project
    assert "- attribution.h5" in project
    with h5py.File(tmp_path / "data.h5") as data, h5py.File(tmp_path / "attribution.h5") as file:
        assert data["data"].shape == file["attribution"].shape
        assert data["label"][int(file["index"][7])] == file["label"][7]


# ---- the cut changes nothing --------------------------------------------------------------------


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    explain(tmp_path / "whole", statistics="all", channels=["conv"])
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shards_of_cut = sorted((tmp_path / "cut" / "shards").iterdir())
    shards_of_cut[0].unlink()
    content = shards_of_cut[1].read_bytes()
    shards_of_cut[1].write_bytes(content[: len(content) // 2])  # half-written
    (tmp_path / "cut" / "shards" / "000002.h5.77.part").write_bytes(b"half")
    (tmp_path / "cut" / "statistics.h5").unlink()
    explain(tmp_path / "cut", statistics="all", channels=["conv"])
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    kept = arrays(tmp_path / "whole" / "statistics.h5")
    assert arrays(tmp_path / "cut" / "statistics.h5") == kept


def test_a_batch_with_broken_samples_gives_the_others_the_same_rows(tmp_path: Path) -> None:
    with h5py.File(explain(tmp_path / "a")) as file:
        whole = file["attribution"][:]
    path = explain(tmp_path / "b", Pictures(broken=(0, 5, 6, 21)))
    with h5py.File(path) as file:
        index = file["index"][:]
        assert index.tolist() == [i for i in range(22) if i not in (0, 5, 6, 21)]
        assert file["attribution"][:] == pytest.approx(whole[index], rel=1e-4, abs=1e-7)
        assert file.attrs["skipped"] == 4
    assert "21,OSError: image file is truncated" in (tmp_path / "b" / "skipped.csv").read_text()
    with h5py.File(tmp_path / "b" / "data.h5") as file:
        assert not file["present"][5]
        assert file["data"][5].max() == 0
        assert file["name"].asstr()[7] == "7"


def test_worker_processes_read_the_same(tmp_path: Path) -> None:
    dataset = Pictures(broken=(9,))
    explain(tmp_path / "a", dataset)
    explain(tmp_path / "b", dataset, workers=2)
    assert shards(tmp_path / "a") == shards(tmp_path / "b")


@pytest.mark.parametrize("lost", ["data.h5", "statistics.h5", "label_map.json", "run.json"])
def test_killed_while_it_merges(lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All shards are there, the files over them are not; and a report was made meanwhile."""
    real = Path.replace

    def replace_or_die(self: Path, target: Path) -> Any:
        if Path(target).name == lost and len(list(tmp_path.glob("shards/*.h5"))) == 3:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace_or_die)
    with pytest.raises(KeyboardInterrupt):
        explain(tmp_path, statistics="all")
    monkeypatch.undo()
    StoredRun(tmp_path).close()
    explain(tmp_path, statistics="all")
    whole = explain(tmp_path.with_name("whole"), statistics="all").parent
    for name in ("attribution.h5", "data.h5", "statistics.h5"):
        ours, theirs = arrays(tmp_path / name), arrays(whole / name)
        ours.pop("attribution.h5", None), theirs.pop("attribution.h5", None)  # has times
        assert ours == theirs
    for name in ("label_map.json", "project.yaml", "skipped.csv"):
        assert (tmp_path / name).exists()


def test_a_run_that_is_done_is_left_alone(tmp_path: Path) -> None:
    path = explain(tmp_path)
    before = path.stat().st_mtime_ns
    assert explain(tmp_path).stat().st_mtime_ns == before


# ---- faults -------------------------------------------------------------------------------------


def test_another_run_in_the_folder_is_an_error(tmp_path: Path) -> None:
    explain(tmp_path)
    with pytest.raises(StorageError, match=r"targets was \['predicted'\], now \[2\]"):
        explain(tmp_path, target=2)


def test_a_sample_the_model_cannot_take_is_listed(tmp_path: Path) -> None:
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x / x[:, :1])

    x = torch.rand(6, 4) + 1
    x[2, 0] = 0
    x[4, 1] = torch.nan
    path = explain_dataset(Fragile().eval(), TensorDataset(x), tmp_path, batch_size=3)
    with h5py.File(path) as file:
        assert file["index"][:].tolist() == [0, 1, 3, 5]
    reasons = (tmp_path / "skipped.csv").read_text().splitlines()
    assert reasons[1].startswith("2,")
    assert reasons[2] == "4,ValueError: holds values that are infinite or not a number"


def test_not_one_sample_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Not one sample could be read.*skipped\.csv"):
        explain(tmp_path, Pictures(4, broken=(0, 1, 2, 3)))


def test_what_does_not_fit(tmp_path: Path) -> None:
    for options, said in (
        ({"target": 3}, "out of range: the model has 3 outputs"),
        ({"target": "best"}, "neither 'predicted' nor 'label'"),
        ({"layers": ["conv1"]}, "no layer 'conv1'; its layers are conv, pool, head"),
        ({"shard_size": 6}, "multiple of batch_size"),
        ({"dtype": "int8"}, "must be 'float16' or 'float32'"),
        ({"dataset": Pictures(0)}, "data set is empty"),
        ({"dataset": iter(())}, "not a map-style data set"),
        ({"dataset": TensorDataset(torch.rand(2, 3, 8, 8)), "target": "label"}, "have none"),
    ):
        with pytest.raises(InputError, match=said):
            explain(tmp_path / said[:9], **options)


def test_a_full_disk_is_said_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explain(tmp_path / "whole")
    real, written = Path.open, []

    def open_until_full(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.suffix == ".part" and self.parent.name == "shards":
            written.append(self)
            if len(written) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_until_full)
    with pytest.raises(StorageError, match=r"No space left on device.*Make room and run the same"):
        explain(tmp_path / "full")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "full" / "shards").iterdir()] == ["000000.h5"]
    merge(tmp_path / "full")  # what is there is usable
    with h5py.File(tmp_path / "full" / "attribution.h5") as file:
        assert len(file["attribution"]) == 8
        assert not file.attrs["complete"]
    explain(tmp_path / "full")
    assert shards(tmp_path / "full") == shards(tmp_path / "whole")


def test_a_file_that_may_not_grow_is_said(tmp_path: Path) -> None:
    """The real thing: the operating system cuts the writing short."""
    explain(tmp_path / "whole")
    size = (tmp_path / "whole" / "shards" / "000000.h5").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
        with pytest.raises(StorageError, match="cannot be written: File too large"):
            explain(tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert not shards(tmp_path / "full")


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    path = explain(tmp_path, Pictures(160), shard_size=4)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = set(map(int, os.listdir("/proc/self/fd")))
        free = itertools.islice((i for i in itertools.count() if i not in used), 25)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(free), limits[1]))
        stored = StoredRun(tmp_path)
        parts = [stored.rows("attribution", i, i + 16) for i in range(0, 160, 16)]
        stored.close()
        assert all(np.abs(part).sum((1, 2, 3)).min() > 0.1 for part in parts)
        with h5py.File(path) as file:  # all at once: what HDF5 cannot open is not taken for 0
            assert np.isnan(file["attribution"][:]).any()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "data.h5").write_text("mine")
    (tmp_path / "film.part").write_text("mine")
    with pytest.raises(StorageError, match=r"holds no run, but data\.h5, which a run would"):
        explain(tmp_path)
    (tmp_path / "data.h5").rename(tmp_path / "mine.h5")
    explain(tmp_path)
    assert (tmp_path / "film.part").read_text() == "mine"


def test_fewer_samples_than_a_batch(tmp_path: Path) -> None:
    explain(tmp_path, Pictures(3), batch_size=8)
    assert Run.read(tmp_path).batch_size == 3


def test_folder_of_no_run(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"holds no run\.json"):
        Run.read(tmp_path)


# ---- several processes --------------------------------------------------------------------------


def torchrun(
    ranks: int, *arguments: object, out: Path, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks,
             "--max-restarts", restarts]  # fmt: skip
    options = ["--workers", 0, "--device", "cpu", "--threads", 1, "--out", out]
    command = [sys.executable, *start, "-m", "captum_rlrp", "dataset", *arguments, *options]
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_two_ranks_by_torchrun_give_the_bits_of_one(tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    arguments = ["tests.dataset_samples:pictures", "--model", "tests.dataset_samples:build",
                 "--batch-size", 4, "--shard-size", 4, "--channels", "conv",
                 "--statistics", "all"]  # fmt: skip
    done = torchrun(2, *arguments, out=two)
    assert done.returncode == 0, done.stderr
    assert "1 samples skipped" in done.stderr
    assert "on 2 ranks" in done.stdout
    dataset = Pictures(broken=(5,))
    options: dict[str, Any] = {"shard_size": 4, "channels": ["conv"], "statistics": "all"}
    explain(one, dataset, **options)
    for _ in range(2):
        assert shards(two) == shards(one)
        assert arrays(two / "statistics.h5") == arrays(one / "statistics.h5")
        # Then what is missing is made by another number of ranks.
        (two / "shards" / "000003.h5").unlink()
        (two / "statistics.h5").unlink()
        explain(two, dataset, **options)


def test_torchrun_restarts_ranks_of_which_one_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, out = tmp_path / "killed", tmp_path / "out"
    monkeypatch.setenv("KILLED", str(mark))
    arguments = ["tests.dataset_samples:Deadly", "--model", "tests.dataset_samples:build",
                 "--batch-size", 4, "--shard-size", 4]  # fmt: skip
    done = torchrun(2, *arguments, out=out, restarts=1)
    assert done.returncode == 0, done.stderr
    assert (out / "shards" / "000001.h5").stat().st_mtime <= mark.stat().st_mtime  # not anew
    explain(tmp_path / "unharmed", shard_size=4)
    assert shards(out) == shards(tmp_path / "unharmed")


def test_more_ranks_than_samples(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", per_class=1)
    data = (tmp_path / "in" / "ant" / "0.png", "--model", "tests.dataset_samples:build")
    done = torchrun(3, *data, "--pixels", 8, "--statistics", "all", out=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "on 3 ranks" in done.stdout
    with h5py.File(tmp_path / "out" / "attribution.h5") as file:
        assert file["index"][:].tolist() == [0]


def test_killed_ranks_cost_nothing() -> None:
    """A few kills; a hundred by ``scripts/kill_ranks.py`` itself."""
    command = [sys.executable, "scripts/kill_ranks.py", "--kills", "2", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all equal" in done.stdout
