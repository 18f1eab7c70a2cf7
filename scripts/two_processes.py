"""How much faster two ranks on two cores are than one rank on one: `captum-rlrp dataset`, twice.

    python scripts/two_processes.py [--samples 256] [--model resnet18] [--repeat 3]

Needs two cores that do nothing else. Each rank has one thread and reads its samples itself. The
first batch, which captures the model, counts, as it does for a user: take enough samples.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class Noise(Dataset):
    """Pictures that take no time to read."""

    def __len__(self) -> int:
        return int(os.environ.get("SAMPLES", "256"))

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(3, 224, 224, generator=torch.Generator().manual_seed(index))


def build() -> nn.Module:
    from torchvision import models

    torch.manual_seed(0)
    return models.get_model(os.environ.get("MODEL", "resnet18"), weights=None).eval()


def measure(ranks: int, cores: list[int], out: Path) -> dict[str, float]:
    """Samples a second of a run on so many ranks, and what the time went into."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks > 1 else []), "-m", "captum_rlrp", "dataset",
               "two_processes:Noise", "--model", "two_processes:build", "--workers", "0",
               "--threads", "1", "--batch-size", "8", "--shard-size", "32", "--device", "cpu",
               "--out", str(out)]  # fmt: skip
    here = Path(__file__).parent
    kept = {"preexec_fn": lambda: os.sched_setaffinity(0, cores), "capture_output": True}
    done = subprocess.run(command, cwd=here, text=True, env={**os.environ}, **kept)
    if done.returncode:
        sys.exit(done.stderr)
    with h5py.File(out / "attribution.h5") as file:
        names = ("samples_per_second", "share_waiting_for_data", "share_writing")
        return {name: float(file.attrs[name]) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--model", default="resnet18", help="torchvision's name")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    os.environ |= {"SAMPLES": str(options.samples), "MODEL": options.model}
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        sys.exit("There is only one core here.")
    best = {1: 0.0, 2: 0.0}
    for _ in range(options.repeat):
        for ranks in best:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(ranks, cores[:ranks], Path(folder) / "run")
            print(ranks, "ranks:", ", ".join(f"{k} {v:.3g}" for k, v in found.items()), flush=True)
            best[ranks] = max(best[ranks], found["samples_per_second"])
    print(f"two ranks do {best[2] / best[1]:.2f} times what one does (best of {options.repeat})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
