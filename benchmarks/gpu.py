"""What only a GPU can tell, in one process, the most telling first.

    python benchmarks/gpu.py load agree speed breakdown peers every_op --out results.jsonl
    python benchmarks/gpu.py speed --device cpu          # tiny, to see that it works

Every figure is a line of JSON as soon as it is known. ``scripts/gpu_check.sh`` runs this within a
budget; ``run.py`` measures more of the same, with more time.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torchvision import models

from captum_rlrp import RelativeLRP, show_config
from captum_rlrp.kernels import extension

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
OURS, RECORDED, YARDSTICK = "Relative LRP", "Relative LRP, CUDA graph", "InputXGradient"

Case = tuple[str, int, bool]  # model, batch, channels_last
CASES: tuple[Case, ...] = (
    ("resnet50", 64, False),
    ("resnet50", 1, False),
    ("vgg16", 64, False),
    ("resnet50", 64, True),
    ("resnet50", 256, False),
    ("vgg16", 1, False),
    ("vgg16", 64, True),
    ("resnet50", 256, True),
    ("vgg16", 256, False),
    ("resnet50", 1, True),
    ("vgg16", 1, True),
    ("vgg16", 256, True),
)
ROUNDS = 15  # at most
CASE_SECONDS = 4.0  # then a case gets no further round

# What one explanation may be apart from float64 on the CPU, as a share of Σ|R|.
APART = (
    ("float64", False, 1e-10),
    ("float32", False, 1e-4),
    ("float32", True, 0.05),  # TF32
    ("bfloat16", False, 0.25),
    ("float16", False, 0.15),
)


class Bench:
    """Where it runs and where the figures go."""

    def __init__(self, device: str, out: Path | None) -> None:
        self.device = device
        self.tiny = device == "cpu"
        self.out = out
        self.part = ""
        self.failed = False

    def note(self, **figures: Any) -> None:
        line = json.dumps({"part": self.part, **figures})
        print(line, flush=True)
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(line + "\n")

    def wrong(self, **figures: Any) -> None:
        self.failed = True
        self.note(wrong=True, **figures)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start


# ---- load and agree ----------------------------------------------------------------------------


def load(bench: Bench) -> None:
    """Whether the modules load, the versions, and what a plain copy and a product reach."""
    ready = extension.available() and (bench.tiny or extension.cuda_available())
    chip = torch.cuda.get_device_name() if bench.device == "cuda" else "CPU"
    bench.note(chip=chip, python=sys.version.split()[0], cudnn=torch.backends.cudnn.version())
    bench.note(**{key: str(value) for key, value in show_config().items()})
    (bench.note if ready else bench.wrong)(loads=ready)
    source = torch.randn(2 ** (20 if bench.tiny else 28), device=bench.device)
    target = torch.empty_like(source)
    best = min(bench.seconds(lambda: target.copy_(source)) for _ in range(20))
    bench.note(copy_gb_s=round(2 * source.nbytes / best / 1e9, 1))
    n = 256 if bench.tiny else 8192
    a = torch.randn(n, n, device=bench.device, dtype=torch.bfloat16)
    best = min(bench.seconds(lambda: a @ a) for _ in range(10))
    bench.note(product_tflop_s=round(2 * n**3 / best / 1e12, 2))


def vgg11() -> nn.Module:
    """With batch norm, and without its dense layers of a hundred million parameters."""
    features = models.vgg.make_layers(models.vgg.cfgs["A"], batch_norm=True)
    return nn.Sequential(features, nn.Flatten(), nn.Linear(2048, 10))


def agree(bench: Bench) -> None:
    """Small networks against float64 on the CPU, in every dtype, with and without TF32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    for make in (models.resnet18, vgg11):
        torch.manual_seed(0)
        model, x = make().eval().double(), torch.randn(4, 3, 64, 64, dtype=torch.float64)
        expected = RelativeLRP(model, backend="reference").attribute(x, target=[1, 2, 3, 4])
        for name, tf32, bound in APART:
            dtype = getattr(torch, name)
            cudnn.allow_tf32 = matmul.allow_tf32 = tf32
            found = copy.deepcopy(model).to(bench.device, dtype)
            actual, delta = RelativeLRP(found).attribute(
                x.to(bench.device, dtype), target=[1, 2, 3, 4], return_convergence_delta=True
            )
            gaps = (actual.double().cpu() - expected).abs().flatten(1).sum(1)
            apart = gaps / expected.abs().flatten(1).sum(1)
            # Of elements of a window that are equal up to rounding, another may win in a sample.
            note = bench.note if float(apart.median()) < bound else bench.wrong
            figures = {"apart": float(apart.median()), "at_most": float(apart.max())}
            figures["delta"] = float(delta.max())
            note(model=make.__name__, dtype=name, tf32=tf32, **figures)
        if bench.device == "cuda":
            cudnn.allow_tf32 = matmul.allow_tf32 = False
            agree_recorded(bench, copy.deepcopy(model).float().cuda(), x.float().cuda())
    cudnn.allow_tf32, matmul.allow_tf32 = True, False  # as PyTorch has it


def agree_recorded(bench: Bench, model: nn.Module, x: torch.Tensor) -> None:
    plain, recorded = RelativeLRP(model), RelativeLRP(model, cuda_graphs=True)
    apart = 0.0
    for shift in (0.0, 0.1, 0.2, 0.3):
        expected = plain.attribute(x + shift, target=1)
        actual = recorded.attribute(x + shift, target=1)
        apart = max(apart, float((actual - expected).abs().sum() / expected.abs().sum()))
    kept = len(recorded._engine.recordings["cuda"])
    (bench.note if kept and apart < 1e-4 else bench.wrong)(recorded=kept, apart=apart)


# ---- speed -------------------------------------------------------------------------------------


@functools.cache
def plain(name: str, device: str) -> nn.Module:
    from contenders import SUBJECTS, Given

    return SUBJECTS[name].model(Given(device))


def explainer(name: str, method: str, dtype: torch.dtype, last: bool, device: str) -> Any:
    """With a copy of the model of its own."""
    from contenders import METHODS

    model = copy.deepcopy(plain(name, device)).to(dtype)
    return METHODS[method](model.to(memory_format=torch.channels_last) if last else model)


def inputs_of(bench: Bench, name: str, batch: int, dtype: torch.dtype, last: bool) -> Any:
    from contenders import SUBJECTS, Given

    given = Given(bench.device, dtype, last, 32 if bench.tiny else 224)
    return SUBJECTS[name].inputs(min(batch, 2) if bench.tiny else batch, given)


def measure(bench: Bench, case: Case, dtype: str, methods: Sequence[str]) -> None:
    """The methods take turns; a ratio compares two calls of the same turn."""
    name, batch, last = case
    kind = DTYPES[dtype]
    x, target = inputs_of(bench, name, batch, kind, last)
    about = {"model": name, "dtype": dtype, "channels_last": last, "batch": len(x)}
    explainers: dict[str, Callable[[], object]] = {}
    for method in methods:
        try:
            explain = explainer(name, method, kind, last, bench.device)
            for _ in range(3):
                explain(x, target)
        except Exception as error:
            bench.wrong(**about, method=method, error=f"{type(error).__name__}: {error}"[:300])
            continue
        explainers[method] = functools.partial(explain, x, target)
    rounds: dict[str, list[float]] = {method: [] for method in explainers}
    started = time.perf_counter()
    for done in range(2 if bench.tiny else ROUNDS):
        if done >= 3 and time.perf_counter() - started > CASE_SECONDS:
            break
        for method, run in explainers.items():
            rounds[method].append(bench.seconds(run))
    for method, times in rounds.items():
        middle = statistics.median(times)
        figures = {"ms": round(middle * 1e3, 3), "per_second": round(len(x) / middle, 1)}
        if YARDSTICK in rounds:
            pairs = zip(times, rounds[YARDSTICK], strict=True)
            figures["ratio"] = round(statistics.median(a / b for a, b in pairs), 3)
        if bench.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            bench.seconds(explainers[method])
            figures["mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
        bench.note(**about, method=method, rounds=len(times), **figures)
    explainers.clear()
    if bench.device == "cuda":
        torch.cuda.empty_cache()


def cases(bench: Bench, most: int) -> Iterator[tuple[Case, str]]:
    for case in CASES[: 2 if bench.tiny else most]:
        for dtype in DTYPES:
            yield case, dtype


def speed(bench: Bench) -> None:
    """ResNet50 and VGG16 beside InputXGradient and beside their convolutions alone."""
    graphs = [RECORDED] if bench.device == "cuda" else []
    for case, dtype in cases(bench, len(CASES)):
        # A recording keeps the memory of a whole explanation, and what it saves is launches.
        methods = [OURS, *(graphs if case[1] <= 64 else []), YARDSTICK, "the floor"]
        measure(bench, case, dtype, methods)


def peers(bench: Bench) -> None:
    for case, dtype in cases(bench, 3):
        measure(bench, case, dtype, [OURS, YARDSTICK, "zennit EpsilonPlus", "captum LRP"])


# ---- where the time goes -----------------------------------------------------------------------


def breakdown(bench: Bench) -> None:
    """Every operation's time; our kernels' GB/s beside a copy's; the kernels that take longest."""
    from breakdown import copy_speed, parts_of

    if not bench.tiny:
        copied = round(copy_speed(bench.device, torch.float32) / 1e9, 1)
        bench.note(copy_gb_s=copied)
    for name in ("resnet50",) if bench.tiny else ("resnet50", "vgg16"):
        for dtype, kind in DTYPES.items():
            x, target = inputs_of(bench, name, 64, kind, False)
            explain = explainer(name, OURS, kind, False, bench.device)
            run = functools.partial(explain, x, target)
            for _ in range(3):
                run()
            about = {"model": name, "dtype": dtype, "batch": len(x)}
            whole = statistics.median(bench.seconds(run) for _ in range(5))
            bench.note(**about, whole_ms=round(whole * 1e3, 3))
            parts = parts_of(explain, (x, target), bench.device)
            for part in sorted(parts, key=lambda part: -part.seconds)[:20]:
                figures = {"calls": part.calls, "ms": round(part.seconds * 1e3, 4)}
                if part.moved:
                    figures["gb_s"] = round(part.moved / part.seconds / 1e9, 1)
                bench.note(**about, op=part.op, **figures)
            if bench.device == "cuda":
                slowest_kernels(bench, about, run)


def slowest_kernels(bench: Bench, about: dict[str, Any], run: Callable[[], object]) -> None:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        bench.seconds(run)
    events = [e for e in profiled.key_averages() if e.device_type != DeviceType.CPU]
    bench.note(**about, launches=sum(e.count for e in events))
    for event in sorted(events, key=lambda e: -e.self_device_time_total)[:15]:
        ms = round(event.self_device_time_total / 1e3, 4)
        bench.note(**about, kernel=event.key[:120], calls=event.count, ms=ms)


# ---- for compute-sanitizer ---------------------------------------------------------------------


def every_op(bench: Bench) -> None:
    """Every op that has a CUDA kernel, in every dtype and layout, and a small network."""
    sys.path.insert(0, str(ROOT))
    from tests.kernels.common import DTYPES as ALL
    from tests.kernels.common import LAYOUTS
    from tests.kernels.test_ops import calls

    called = set()
    for dtype in ALL:
        for layout in LAYOUTS[:2] if bench.tiny else LAYOUTS:
            for name, arguments in calls(dtype, layout, bench.device).items():
                getattr(extension.ops, name)(*arguments)
                called.add(name)
    bench.synchronize()
    names = torch._C._dispatch_get_all_op_names()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    ours = {n for n in names if n.startswith("captum_rlrp::") and has_kernel(n, "CUDA")}
    left = sorted(name.partition("::")[2] for name in ours)
    left = [name for name in left if name not in called]
    (bench.wrong if left else bench.note)(called=len(called), not_called=left)
    for dtype in (torch.float32, torch.bfloat16):
        model = models.resnet18().eval().to(bench.device, dtype)
        x = torch.randn(2, 3, 32, 32, device=bench.device, dtype=dtype)
        RelativeLRP(model).attribute(x, target=1)
    bench.synchronize()
    bench.note(done=True)


PARTS = {f.__name__: f for f in (load, agree, speed, breakdown, peers, every_op)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", choices=list(PARTS), nargs="+")
    parser.add_argument("--out", type=Path, help="file that the lines are added to")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    bench = Bench(args.device, args.out)
    for name in args.parts:
        bench.part = name
        PARTS[name](bench)
    sys.exit(bench.failed)


if __name__ == "__main__":
    main()
