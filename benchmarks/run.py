"""Relative LRP beside what else a user could run, on whole models.

    make bench                                          # everything, about 25 minutes on two cores
    python benchmarks/run.py --models resnet50 --batches 8
    python benchmarks/run.py --quick                    # small images, to see that it works
    python benchmarks/run.py --kernels                  # the section on kernels, and nothing else
    python benchmarks/run.py --families                 # the smallest of each of timm's, at batch 2

Time: the methods take turns in one process (A B C D A B C D …), and a ratio compares two calls of
the same turn. Memory: each method, model and batch in a process of its own. The figures go to
``benchmarks/results``, ``docs/benchmarks.md`` and ``docs/images``; those of a run that leaves
something out go to the same places under ``build/bench``, or under ``--out``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import math
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import report
import torch
from contenders import (
    FLOOR,
    METHODS,
    ON_GPU,
    OURS,
    PEERS,
    SUBJECTS,
    YARDSTICK,
    Explain,
    Given,
    Inputs,
    Subject,
    contender,
    relative_lrp,
    tiny_mlp,
)

from captum_rlrp import __version__, show_config

ROOT = Path(__file__).resolve().parent.parent
MEBIBYTE = 2**20

T = TypeVar("T")

ROUNDS = 3  # at least
CELL_SECONDS = 40.0  # then a model and batch gets no further round
SLOW_SECONDS = 10.0  # a peer that would take longer for one call is left out


@dataclass
class Cell:
    """One model, batch and method."""

    model: str
    batch: int
    method: str
    seconds: list[float] = field(default_factory=list)
    ratio: float | None = None  # to InputXGradient, the median over the rounds
    peak_mib: float | None = None  # beyond what stays between calls, for the whole batch
    first_peak_mib: float | None = None  # likewise, of the first call at this batch size
    kept_mib: float | None = None  # between calls
    loading_s: float | None = None  # of a first explanation of anything in the process
    first_s: float | None = None  # of the model's first call
    new_batch_s: float | None = None  # of the first call at this batch size
    later_s: float | None = None  # of the one after it
    growth: float | None = None  # time per image over that at the batch size before
    error: str | None = None
    note: str | None = None


# --- time ---------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(explain: Explain, inputs: Inputs, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    explain(*inputs)
    synchronize(device)
    return time.perf_counter() - start


def describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 120 else f"{text[:119]}…"


def check(explain: Explain, inputs: Inputs) -> None:
    """Warms up, too: an explanation is recorded when it comes for the second time."""
    explain(*inputs)
    attributions = explain(*inputs)
    if attributions is not None and not attributions.isfinite().all():
        raise ArithmeticError("the attributions are not finite")


def given_by(args: argparse.Namespace) -> Given:
    return Given(args.device, getattr(torch, args.dtype), args.channels_last, args.size)


def time_model(name: str, args: argparse.Namespace) -> list[Cell]:
    subject, given = SUBJECTS[name], given_by(args)
    explainers: dict[str, Explain] = {}
    failed: dict[str, str] = {}
    for method in args.methods:
        try:
            explainers[method] = contender(subject, method, given)
        except Exception as error:
            failed[method] = describe(error)
    cells: list[Cell] = []
    for batch in args.batches:
        inputs = subject.inputs(batch, given)
        row = {method: Cell(name, batch, method) for method in args.methods}
        for method, cell in row.items():
            cell.error = failed.get(method)
            if method in PEERS:
                cell.note = too_slow([c for c in cells if c.method == method], batch)
        running = {m: explainers[m] for m, c in row.items() if not c.error and not c.note}
        for method in list(running):
            try:
                check(running[method], inputs)
            except Exception as error:
                row[method].error = describe(error)
                del running[method]
        started = time.perf_counter()
        for done in range(args.repeats):
            if done >= ROUNDS and time.perf_counter() - started > CELL_SECONDS:
                break
            for method, explain in running.items():
                row[method].seconds.append(timed(explain, inputs, args.device))
        for cell in row.values():
            pairs = zip(
                cell.seconds, row[YARDSTICK].seconds if YARDSTICK in row else (), strict=False
            )
            cell.ratio = median([mine / theirs for mine, theirs in pairs])
        cells += row.values()
        say(f"{name}, batch {batch}: " + ", ".join(map(brief, row.values())))
    return cells


def time_batches(name: str, args: argparse.Namespace) -> dict[int, float]:
    """What an image costs at each batch size, over its cost at the size before: sizes in turns."""
    subject, given = SUBJECTS[name], given_by(args)
    explain = contender(subject, OURS, given)
    inputs = {n: subject.inputs(n, given) for n in args.batches}
    for batch in inputs.values():
        check(explain, batch)
    rounds: list[dict[int, float]] = []
    started = time.perf_counter()
    while len(rounds) < min(ROUNDS, args.repeats) or (
        len(rounds) < args.repeats and time.perf_counter() - started < CELL_SECONDS
    ):
        rounds.append({n: timed(explain, batch, args.device) / n for n, batch in inputs.items()})
    return {
        n: statistics.median(each[n] / each[before] for each in rounds)
        for before, n in itertools.pairwise(args.batches)
    }


def apart(measure: Callable[[str, argparse.Namespace], T], name: str, args: Any) -> T:
    """In a process of its own: others leave gigabytes behind, and memory decides speed."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=quiet) as pool:
        try:
            return pool.submit(measure, name, args).result()
        except BrokenProcessPool:
            sys.exit(f"{name}: killed, for want of memory most likely; try smaller --batches")


def quiet() -> None:
    warnings.simplefilter("ignore")


def too_slow(earlier: list[Cell], batch: int) -> str | None:
    """From the time per image at the last batch that was measured."""
    measured = [c for c in earlier if c.seconds]
    if not measured:
        return None
    expected = statistics.median(measured[-1].seconds) / measured[-1].batch * batch
    return f"left out: about {expected:.0f} s per call" if expected > SLOW_SECONDS else None


def median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def brief(cell: Cell) -> str:
    if not cell.seconds:
        return f"{cell.method} {'failed' if cell.error else 'left out'}"
    ratio = "" if cell.ratio is None else f" ({cell.ratio:.2f})"
    return f"{cell.method} {statistics.median(cell.seconds) * 1e3:.1f} ms{ratio}"


def say(text: str) -> None:
    print(text, flush=True)


# --- memory: a process of its own ---------------------------------------------------------------


def resident() -> int:
    """Bytes of this process in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def settle(device: str) -> int:
    """Bytes in use after everything that is free was given back."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return resident()


@contextlib.contextmanager
def highest(device: str) -> Iterator[list[int]]:
    """The most bytes in use inside the block; on the CPU sampled every millisecond."""
    peak = [0]
    if device == "cuda":
        yield peak
        torch.cuda.synchronize()
        peak[0] = torch.cuda.max_memory_allocated()
        return
    finished = threading.Event()

    def sample() -> None:
        while not finished.wait(0.001):
            peak[0] = max(peak[0], resident())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        finished.set()
        sampler.join()


def inspect_alone(subject: Subject, method: str, batch: int, args: argparse.Namespace) -> None:
    """What the fresh process does: a call on a single sample, then the two that are looked at."""
    given = given_by(args)
    one, inputs = subject.inputs(1, given), subject.inputs(batch, given)
    # Lazily imported modules are neither the model's nor the method's.
    small = relative_lrp(tiny_mlp().eval().to(given.device, given.dtype))
    small_inputs = SUBJECTS["tiny_mlp"].inputs(1, given)
    result = {"loading_s": timed(small, small_inputs, args.device)}
    explain = contender(subject, method, given)
    untouched = settle(args.device)
    result["first_s"] = timed(explain, one, args.device)
    result["kept_mib"] = max(settle(args.device) - untouched, 0) / MEBIBYTE
    for seconds, mebibytes in (("new_batch_s", "first_peak_mib"), ("later_s", "peak_mib")):
        settle(args.device)
        with highest(args.device) as peak:
            result[seconds] = timed(explain, inputs, args.device)
        # What is kept between calls is in use as well.
        result[mebibytes] = max(peak[0] - untouched, 0) / MEBIBYTE
    print(json.dumps(result))


def inspect(cell: Cell, args: argparse.Namespace) -> None:
    """Fill the cell from a fresh process."""
    command = [sys.executable, __file__, "--alone", cell.model, cell.method, str(cell.batch)]
    command += ["--device", args.device, "--dtype", args.dtype, "--size", str(args.size)]
    command += ["--channels-last"] if args.channels_last else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [f"exit status {error.returncode}"])[-1]
        say(f"  no memory figure for {cell.method}, {cell.model}, batch {cell.batch}: {reason}")
        return
    except subprocess.TimeoutExpired:
        say(f"  no memory figure for {cell.method}, {cell.model}, batch {cell.batch}: too slow")
        return
    for key, value in json.loads(done.stdout.splitlines()[-1]).items():
        setattr(cell, key, value)


# --- kernels ------------------------------------------------------------------------------------


def time_kernels() -> list[dict[str, Any]]:
    """Medians of ``test_kernels.py``, one row for each kernel and size."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "kernels.json"
        tests = Path(__file__).with_name("test_kernels.py")
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", str(tests), f"--benchmark-json={result}"],
            cwd=ROOT,
            check=True,
        )
        benchmarks = json.loads(result.read_text())["benchmarks"]
    return [
        {"kernel": b["name"], "compiled_s": b["stats"]["median"], **b["extra_info"]}
        for b in benchmarks
    ]


# --- families -----------------------------------------------------------------------------------


def time_family(family: str, args: argparse.Namespace) -> dict[str, Any]:
    """The smallest timm model of a family: first call, ours and the floor over the yardstick."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import families

    row: dict[str, Any] = {"family": family, "model": families.timm_families()[family]}
    try:
        model, x, _ = families.timm_model(family)
        model, target = model.eval(), torch.zeros(len(x), dtype=torch.long)
        ours, theirs = METHODS[OURS](model), METHODS[YARDSTICK](model)
        row["first_s"] = timed(ours, (x, target), "cpu")
        check(theirs, (x, target))
        contenders = [ours, theirs]
        with contextlib.suppress(Exception):  # a layer that pads by itself has no floor
            floor = METHODS[FLOOR](model)
            floor(x, target)
            contenders.append(floor)
        rounds = max(ROUNDS, min(args.repeats, int(5 / timed(ours, (x, target), "cpu"))))
        turns = [[timed(e, (x, target), "cpu") for e in contenders] for _ in range(rounds)]
        row["seconds"] = statistics.median(turn[0] for turn in turns)
        row["ratio"] = statistics.median(turn[0] / turn[1] for turn in turns)
        if len(contenders) == 3:
            row["floor"] = statistics.median(turn[2] / turn[1] for turn in turns)
    except Exception as error:
        row["error"] = describe(error)
    return row


def time_families(args: argparse.Namespace) -> list[dict[str, Any]]:
    sys.path.insert(0, str(ROOT / "scripts"))
    import families

    rows = []
    for family in args.only or families.timm_families():
        rows.append(time_family(family, args))  # in one process, which imports timm once
        say(str(rows[-1]))
        gc.collect()
    return rows


# --- all together -------------------------------------------------------------------------------


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def circumstances(args: argparse.Namespace) -> dict[str, Any]:
    machine = f"{processor()}, {len(os.sched_getaffinity(0))} cores"
    if args.device == "cuda":
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    versions = {"captum-rlrp": __version__}
    for name in ("torch", "torchvision", "captum", "zennit"):
        with contextlib.suppress(PackageNotFoundError):  # a peer that is not there
            versions[name] = version(name)
    script, arguments = Path(sys.argv[0]).name, shlex.join(sys.argv[1:])
    is_whole = script == "run.py" and not arguments
    return {
        "date": date.today().isoformat(),
        "command": "make bench" if is_whole else f"python benchmarks/{script} {arguments}".rstrip(),
        "machine": machine,
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "size": args.size,
        "channels_last": args.channels_last,
        "backend": show_config()["backend"],
        "versions": versions,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=SUBJECTS)
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--repeats", type=int, help="rounds at most; fewer if they take long")
    parser.add_argument("--size", type=int, help="height and width of the images (224)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    parser.add_argument(
        "--channels-last", action="store_true", help="models and images; else as modules have them"
    )
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument(
        "--quick", action="store_true", help="64², batches 1 and 2, one round, no memory"
    )
    parser.add_argument("--kernels", action="store_true", help="the kernels, not the models")
    parser.add_argument("--families", action="store_true", help="timm's families, not the models")
    parser.add_argument("--only", nargs="+", help="of the families, these")
    parser.add_argument("--out", type=Path, help="the folder that holds docs and benchmarks")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    part = (args.quick, args.models, args.methods, args.batches, args.repeats, args.size)
    partial = any(part) or args.no_memory or bool(args.only)
    args.out = args.out or (ROOT / "build" / "bench" if partial else ROOT)
    args.models = args.models or list(SUBJECTS)
    out_of_place = ON_GPU if args.device == "cpu" else ()
    args.methods = args.methods or [name for name in METHODS if name not in out_of_place]
    args.size = args.size or (64 if args.quick else 224)
    args.repeats = args.repeats or (1 if args.quick else 30)
    args.no_memory = args.no_memory or args.quick
    args.batches = sorted(args.batches or ([1, 2] if args.quick else [1, 8, 32]))
    return args


def main() -> None:
    quiet()
    args = parse()
    if args.alone:
        model, method, batch = args.alone
        inspect_alone(SUBJECTS[model], method, int(batch), args)
        return
    if args.kernels:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        figures = circumstances(argparse.Namespace(**{**vars(args), "device": device}))
        report.write(args.out, "kernels", device, {**figures, "kernels": time_kernels()})
        return
    if args.families:
        figures = {**circumstances(args), "families": time_families(args)}
        report.write(args.out, "families", "cpu", figures)
        return
    cells: list[Cell] = []
    for name in args.models:
        of_model = apart(time_model, name, args)
        growth = apart(time_batches, name, args) if OURS in args.methods else {}
        for cell in of_model:
            cell.growth = growth.get(cell.batch) if cell.method == OURS else None
            if cell.seconds and cell.method != FLOOR and not args.no_memory:
                inspect(cell, args)
        ours = [c for c in of_model if c.method == OURS and c.peak_mib is not None]
        for cell in ours:
            each = cell.peak_mib / cell.batch if cell.peak_mib is not None else math.nan
            say(f"  {name}, batch {cell.batch}: {OURS} peaks at {each:.0f} MiB per image")
        cells += of_model
    figures = {**circumstances(args), "cells": [asdict(cell) for cell in cells]}
    report.write(args.out, "models", args.device, figures)


if __name__ == "__main__":
    main()
