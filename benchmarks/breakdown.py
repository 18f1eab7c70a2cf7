"""Where an explanation's time goes, and how near our kernels come to the speed of a plain copy.

    python benchmarks/breakdown.py                                              # CPU, batch 8
    python benchmarks/breakdown.py --device cuda --dtype bfloat16 --batch 64

PyTorch's profiler times the calls; what a kernel moves is counted from its tensors. The figures
go where those of ``run.py`` go.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import report
import torch
from contenders import OURS, SUBJECTS, Explain, Inputs, contender
from run import MEBIBYTE, ROOT, circumstances, given_by, quiet, synchronize, timed
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUNDS = 5
COPIED = 512 * MEBIBYTE  # bytes read by the copy: beyond any cache

# Parts of the names of operations that multiply matrices.
PRODUCTS = ("conv", "mm", "mkldnn", "linear", "matmul")


@dataclass
class Part:
    """What calls of one operation take in an explanation."""

    op: str
    calls: int
    seconds: float
    moved: int  # bytes read and written, or 0 where they are not counted

    @property
    def is_product(self) -> bool:
        return any(word in self.op.rpartition("::")[2] for word in PRODUCTS)

    @property
    def is_ours(self) -> bool:
        return self.op.startswith("captum_rlrp::")


class Moved(TorchDispatchMode):
    """Counts the bytes that our kernels read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "captum_rlrp":
            written = [
                value
                for argument, value in zip(func._schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            tensors = tree_leaves((args, result, written))
            self.bytes[func._schema.name] += sum(map(size, tensors))
        return result


def size(value: Any) -> int:
    """Bytes of a tensor in memory; what is expanded lies there once."""
    if not isinstance(value, Tensor):
        return 0
    count = 1
    for length, stride in zip(value.shape, value.stride(), strict=True):
        count *= length if stride else 1
    return count * value.element_size()


def parts_of(explain: Explain, inputs: Inputs, device: str) -> list[Part]:
    """Every operation's own time, the median of the rounds."""
    moved = Moved()
    with moved:
        explain(*inputs)
    activities = {ProfilerActivity.CPU}
    if device == "cuda":
        activities.add(ProfilerActivity.CUDA)
    seconds: dict[str, list[float]] = defaultdict(list)
    calls: dict[str, int] = {}
    for _ in range(ROUNDS):
        with profile(activities=activities) as profiled:
            explain(*inputs)
            synchronize(device)
        for event in profiled.key_averages():
            if event.device_type != DeviceType.CPU:  # a kernel, which is counted with its op
                continue
            cuda = device == "cuda"
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            if own > 0 and "::" in event.key:
                seconds[event.key].append(own / 1e6)
                calls[event.key] = event.count
    return [
        Part(op, calls[op], statistics.median(own), moved.bytes.get(op, 0))
        for op, own in seconds.items()
    ]


def copy_speed(device: str, dtype: torch.dtype) -> float:
    """Bytes a second, read and written, of a plain copy; the best of many."""
    source = torch.ones(COPIED // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    best = min(timed(lambda a, b: a.copy_(b), (target, source), device) for _ in range(50))
    return 2 * COPIED / best


def break_down(name: str, args: argparse.Namespace) -> dict[str, Any]:
    given = given_by(args)
    explain = contender(SUBJECTS[name], OURS, given)
    inputs = SUBJECTS[name].inputs(args.batch, given)
    for _ in range(3):
        explain(*inputs)
    whole = [timed(explain, inputs, args.device) for _ in range(ROUNDS)]
    return {
        "model": name,
        "seconds": statistics.median(whole),
        "parts": [
            {**asdict(part), "is_product": part.is_product, "is_ours": part.is_ours}
            for part in parts_of(explain, inputs, args.device)
        ],
    }


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=["resnet50", "vgg16"])
    parser.add_argument("--batch", type=int)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, default=ROOT, help="holds docs and benchmarks")
    args = parser.parse_args()
    args.batch = args.batch or (64 if args.device == "cuda" else 8)
    args.size, args.channels_last = 224, False
    figures = {
        **circumstances(args),
        "batch": args.batch,
        "copy": copy_speed(args.device, getattr(torch, args.dtype)),
        "breakdown": [break_down(name, args) for name in args.models],
    }
    report.write(args.out, "breakdown", args.device, figures)


if __name__ == "__main__":
    main()
