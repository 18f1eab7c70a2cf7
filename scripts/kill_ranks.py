"""Kills ranks of a run at random moments and compares what is left, resumed, with a run unharmed.

    python scripts/kill_ranks.py [--kills 100] [--ranks 2] [--seed 0]

Each run is started, one of its ranks is killed (``kill -9``) after a random time, every other time
as soon as one is in the middle of writing a file, and the others are
stopped, as torchrun does; then the same run is started again in the same folder. When one gets to
its end it is compared, array by array, and the next begins in a new folder. A difference is exit
code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import h5py
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from captum_rlrp import RelativeLRP
from captum_rlrp.dataset.runner import explain_dataset

SAMPLES, BATCH, SHARD = 90, 4, 8


class Pictures(Dataset):
    """Noise that takes a while to read, with two broken samples."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(0.02)
        if index in (17, 64):
            raise OSError("image file is truncated")
        generator = torch.Generator().manual_seed(index)
        return torch.rand(3, 12, 12, generator=generator), index % 5


def build() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(54, 5)).eval()


def work(out: str, rank: int, ranks: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, what a killed rank's partners say
    options = {"statistics": "all", "target": ["predicted", "label"], "dtype": "float16"}
    explain_dataset(build(), Pictures(), out, channels=["0"], batch_size=BATCH, shard_size=SHARD,
                    progress=False, **options)  # fmt: skip


def start(out: Path, ranks: int) -> list[BaseProcess]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Forked: the modules are imported once, and a hundred starts take minutes, not an hour.
    fork = multiprocessing.get_context("fork")
    made = [fork.Process(target=work, args=(str(out), r, ranks, port)) for r in range(ranks)]
    for process in made:
        process.start()
    return made


def finish(processes: list[BaseProcess]) -> bool:
    """Whether all came to their end."""
    for process in processes:
        process.join()
    return all(process.exitcode == 0 for process in processes)


def fingerprint(out: Path) -> dict[str, str]:
    """A hash for every array of every shard and of the merged files.

    Not of the files: LZF packs the same values in many ways.
    """
    found: dict[str, str] = {}
    names = sorted(str(path.relative_to(out)) for path in out.glob("shards/*"))
    for name in (*names, "attribution.h5", "data.h5", "statistics.h5"):
        found[name] = ""
        with h5py.File(out / name, "r") as file:

            def note(key: str, item: object, name: str = name) -> None:
                if isinstance(item, h5py.Dataset):
                    value = item[()]
                    data = (
                        repr(value.tolist()).encode() if item.dtype == object else value.tobytes()
                    )
                    found[f"{name}:{key}"] = hashlib.sha256(data).hexdigest()

            file.visititems(note)
    found["skipped.csv"] = (out / "skipped.csv").read_text()
    return found


def writer(out: Path, processes: list[BaseProcess]) -> BaseProcess | None:
    """The next rank that is in the middle of writing a file."""
    while all(process.is_alive() for process in processes):
        for part in out.glob("shards/*.part"):
            pid = int(part.name.split(".")[-2])
            return next((process for process in processes if process.pid == pid), None)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, root = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="kill-ranks-"))
    try:
        return trial(options.kills, options.ranks, chance, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def trial(kills: int, ranks: int, chance: random.Random, root: Path) -> int:
    # What torch.export imports the first time, it imports here: the forked ranks inherit it.
    RelativeLRP(build()).attribute(Pictures()[0][0][None], target=0)
    begin = time.monotonic()
    if not finish(start(root / "unharmed", ranks)):
        print("the unharmed run failed")
        return 1
    whole = time.monotonic() - begin
    expected = fingerprint(root / "unharmed")
    done = runs = leftovers = 0
    out = root / "run"
    while True:
        processes = start(out, ranks)
        if done < kills:
            time.sleep(chance.uniform(0, 1.1 * whole))
            victim = chance.choice(processes)
            if chance.random() < 0.5:
                victim = writer(out, processes) or victim
            if victim.is_alive():
                victim.kill()
                done += 1
            for process in processes:
                if process.is_alive() and process is not victim and victim.exitcode != 0:
                    process.terminate()
        if finish(processes):
            runs += 1
            if (found := fingerprint(out)) != expected:
                differ = [k for k in expected | found if expected.get(k) != found.get(k)]
                print(f"run {runs} differs after {done} kills: {', '.join(differ)}")
                return 1
            shutil.rmtree(out)
            if done == kills:
                break
        else:
            leftovers += len(list(out.glob("**/*.part")))
    print(
        f"{done} kills of one of {ranks} ranks at random moments of a run of {whole:.1f} s: "
        f"{runs} runs came to their end, all equal to the unharmed one in every bit "
        f"({len(expected)} files and arrays each); {leftovers} half-written files were noticed"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
