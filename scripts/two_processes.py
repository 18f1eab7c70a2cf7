"""How much faster two ranks on two cores are than one rank on one: `captum-rlrp dataset`, twice.

    python scripts/two_processes.py [--samples 128] [--model resnet18] [--repeat 3]

Needs two cores that do nothing else, and three minutes. Each rank has one thread and reads its
samples itself. Beside the figure stand two limits, taken in turns with it: two runs that know
nothing of each other, and the explanation of one batch over and over, without reading or writing.
What these lose is the cores' common memory and cache; what two ranks lose besides is ours.

The first batch captures the model, in every rank, however many there are. A short run of this
script would be mostly that, so the rates are of the batches after it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import h5py
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from captum_rlrp.dataset.explaining import Explained, Explainer
from captum_rlrp.dataset.loading import NO_LABEL, Batch

BATCH, SECONDS = 8, 3.0


class Noise(Dataset):
    """Pictures that take no time to read."""

    def __len__(self) -> int:
        return int(os.environ["SAMPLES"])

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(3, 224, 224, generator=torch.Generator().manual_seed(index))


def build() -> nn.Module:
    from torchvision import models

    torch.manual_seed(0)
    return models.get_model(os.environ["MODEL"], weights=None).eval()


# ---- the command ---------------------------------------------------------------------------------


def start(ranks: int, cores: list[int], out: Path) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks > 1 else []), "-m", "captum_rlrp", "dataset",
               "two_processes:Noise", "--model", "two_processes:build", "--workers", "0",
               "--threads", "1", "--batch-size", str(BATCH), "--shard-size", "32",
               "--device", "cpu", "--out", str(out)]  # fmt: skip
    return subprocess.Popen(
        command,
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )


def rate(process: subprocess.Popen[str], out: Path) -> float:
    """Samples a second after the first batch, of a run that is waited for."""
    said, _ = process.communicate()
    if process.returncode:
        sys.exit(said)
    with h5py.File(out / "attribution.h5") as file:
        about = dict(file.attrs)
    steady = about["seconds"] - about["seconds_first_batch"]
    found = float((about["samples"] - about["ranks"] * BATCH) / steady)
    print(
        f"  {about['ranks']} ranks: {found:.2f} samples a second after the first batch, which took "
        f"{about['seconds_first_batch']:.1f} s; {about['samples_per_second']:.2f} with it; waited "
        f"{about['share_waiting_for_data']:.1%}, wrote {about['share_writing']:.1%}",
        flush=True,
    )
    return found


def runs(counts: list[int], cores: list[int]) -> float:
    """Samples a second of runs side by side, on so many ranks each."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / str(i) for i in range(len(counts))]
        on = [cores] if len(counts) == 1 else [[core] for core in cores]
        started = [start(n, c[:n], out) for n, c, out in zip(counts, on, outs, strict=True)]
        return sum(rate(process, out) for process, out in zip(started, outs, strict=True))


# ---- the explanation alone -----------------------------------------------------------------------


def loop(core: int, told: Connection) -> None:
    """Explains one batch over and over, for so many seconds at a time as it is told."""
    os.sched_setaffinity(0, [core])
    torch.set_num_threads(1)
    explainer = Explainer(build(), ["predicted"], batch_size=BATCH)
    inputs = (torch.rand(BATCH, 3, 224, 224),)
    batch = Batch(list(range(BATCH)), inputs, torch.full((BATCH,), NO_LABEL), [])
    explainer.explain(batch, Explained())
    told.send(None)
    while seconds := told.recv():
        begin, cpu, samples = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - begin < seconds:
            explainer.explain(batch, Explained())
            samples += BATCH
        told.send((samples / (time.perf_counter() - begin), samples / (time.process_time() - cpu)))


class Loops:
    """One on each core, silent until asked."""

    def __init__(self, cores: list[int]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.ends = []
        for core in cores:
            ours, theirs = spawn.Pipe()
            spawn.Process(target=loop, args=(core, theirs), daemon=True).start()
            self.ends.append(ours)
        for end in self.ends:
            end.recv()

    def rates(self, which: slice) -> tuple[float, float]:
        """Samples per second, and per second of CPU time, of these loops together."""
        for end in self.ends[which]:
            end.send(SECONDS)
        wall, cpu = zip(*(end.recv() for end in self.ends[which]), strict=True)
        return sum(wall), sum(cpu)

    def end(self) -> None:
        for end in self.ends:
            end.send(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--model", default="resnet18", help="torchvision's name")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    os.environ |= {"SAMPLES": str(options.samples), "MODEL": options.model}
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        sys.exit("There is only one core here.")
    loops = Loops(cores)
    best: dict[str, float] = {}
    for _ in range(options.repeat):
        found = {"one": runs([1], cores), "two": runs([2], cores), "apart": runs([1, 1], cores)}
        found["loop"], found["loop cpu"] = loops.rates(slice(1))
        found["loops"], found["loops cpu"] = loops.rates(slice(2))
        best = {name: max(value, best.get(name, 0.0)) for name, value in found.items()}
    loops.end()
    print(
        f"{options.model}, best of {options.repeat}, in parts of what one does alone:\n"
        f"  two ranks by torchrun             {best['two'] / best['one']:.2f}\n"
        f"  two runs apart                    {best['apart'] / best['one']:.2f}\n"
        f"  explanations alone, two loops     {best['loops'] / best['loop']:.2f}"
        f" (by CPU time {best['loops cpu'] / best['loop cpu']:.2f})\n"
        f"one loop: {best['loop']:.2f} samples a second; one rank: {best['one']:.2f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
