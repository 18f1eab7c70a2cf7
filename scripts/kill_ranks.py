"""Kills ranks of a run at random moments and compares what is left, resumed, with a run unharmed.

    python scripts/kill_ranks.py [--kills 100] [--ranks 2] [--seed 0]

Each run is started, one of its ranks is killed (``kill -9``), and the others are stopped, as
torchrun does; then the same run is started again in the same folder. Every other kill comes after a
random time; the rest are aimed at what was hit least so far, for some of it takes milliseconds.
When a run gets to its end it is compared, array by array, and the next begins in a new folder. A
difference, or a rank that fails of itself, is exit code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from captum_rlrp import RelativeLRP
from captum_rlrp.dataset import runner

SAMPLES, BATCH, SHARD = 90, 4, 8
STARTING, EXPLAINING, WRITING, WAITING, STATISTICS, MERGING = PHASES = (
    *("starting", "explaining", "writing a shard", "waiting for the others"),
    *("merging statistics", "merging rows"),
)
# What a rank is at, in these functions of the runner, and what when they are done.
STEPS = {
    "_work": (EXPLAINING, WAITING),
    "write_shard": (WRITING, EXPLAINING),
    "merge_statistics": (STATISTICS, MERGING),
    "merge": (MERGING, MERGING),
}


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


def work(out: str, rank: int, ranks: int, port: int, at: Any) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, what a killed rank's partners say

    def noted(function: Callable[..., Any], during: str, after: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            at[rank] = PHASES.index(during)
            result = function(*arguments)
            at[rank] = PHASES.index(after)
            return result

        return call

    for name, phases in STEPS.items():
        setattr(runner, name, noted(getattr(runner, name), *phases))
    options = {"statistics": "all", "target": ["predicted", "label"], "dtype": "float16"}
    runner.explain_dataset(build(), Pictures(), out, channels=["0"], batch_size=BATCH,
                           shard_size=SHARD, progress=False, **options)  # fmt: skip


class Ranks:
    """The processes of one start.

    Attributes:
        at: What each is at, or was when it died: a number of `PHASES`.
    """

    def __init__(self, out: Path, count: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # Forked: the modules are imported once, and a hundred starts take minutes, not an hour.
        fork = multiprocessing.get_context("fork")
        self.at = fork.RawArray("b", count)
        self.processes: list[BaseProcess] = [
            fork.Process(target=work, args=(str(out), rank, count, port, self.at))
            for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait_for(self, phase: str) -> int | None:
        """The first rank that is at this; None if a rank ends before."""
        while self.running():
            if PHASES.index(phase) in self.at:
                return list(self.at).index(PHASES.index(phase))
        return None

    def kill(self, rank: int) -> str | None:
        """What it was at; None if it had come to its end."""
        victim = self.processes[rank]
        victim.kill()
        victim.join()
        if victim.exitcode == 0:
            return None
        if victim.exitcode != -signal.SIGKILL:
            raise SystemExit(f"rank {rank} failed of itself: exit code {victim.exitcode}")
        for process in self.processes:
            process.terminate()
        return PHASES[self.at[rank]]

    def finish(self) -> bool:
        """Whether all came to their end."""
        for process in self.processes:
            process.join()
        return all(process.exitcode == 0 for process in self.processes)


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
    if not Ranks(root / "unharmed", ranks).finish():
        print("the unharmed run failed")
        return 1
    whole = time.monotonic() - begin
    expected = fingerprint(root / "unharmed")
    hit: Counter[str] = Counter()
    runs = leftovers = 0
    out = root / "run"
    while True:
        started = Ranks(out, ranks)
        phase = None
        if hit.total() < kills:
            phase = started.kill(strike(started, hit, whole, chance))
            hit.update([phase] if phase else [])
        if started.finish():
            runs += 1
            if (found := fingerprint(out)) != expected:
                differ = [k for k in expected | found if expected.get(k) != found.get(k)]
                print(f"run {runs} differs after {hit.total()} kills: {', '.join(differ)}")
                return 1
            shutil.rmtree(out)
            if hit.total() == kills:
                break
        elif phase is None:
            print(f"a run of which no rank was killed failed after {hit.total()} kills")
            return 1
        else:
            leftovers += len(list(out.glob("**/*.part")))
    print(
        f"{hit.total()} kills of one of {ranks} ranks at random moments of a run of {whole:.1f} s: "
        f"{runs} runs came to their end, all equal to the unharmed one in every bit "
        f"({len(expected)} files and arrays each); {leftovers} half-written files were noticed"
    )
    print("killed while " + ", ".join(f"{phase}: {hit[phase]}" for phase in PHASES))
    return 0


def strike(started: Ranks, hit: Counter[str], whole: float, chance: random.Random) -> int:
    """Wait for a moment to kill; which rank."""
    if hit.total() % 2:
        rank = started.wait_for(min(PHASES, key=lambda phase: hit[phase]))
        if rank is not None:
            # A tenth of a millisecond to a tenth of a second: some phases are short, some long.
            time.sleep(math.exp(chance.uniform(math.log(1e-4), math.log(0.1))))
            return rank
    else:
        time.sleep(chance.uniform(0, 1.1 * whole))
    return chance.randrange(len(started.processes))


if __name__ == "__main__":
    sys.exit(main())
