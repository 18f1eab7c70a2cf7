"""The command line: trains, measures in parallel processes, writes the report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from evaluation import data, networks, real_run, report, robustness, run
from evaluation.protocol import PROTOCOLS, Cell, Protocol

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "captum", "zennit", "quantus", "captum-rlrp")


def work(cell: Cell, seed: int, protocol: Protocol, folder: Path, device: str) -> None:
    """One network, in a process of its own."""
    warnings.filterwarnings("ignore")
    if device == "cpu":
        torch.set_num_threads(1)  # the processes share the cores
    run.evaluate(cell, seed, protocol, folder, device)


def shake(protocol: Protocol, folder: Path) -> None:
    """The robustness section, in a process of its own."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    path = folder / "robustness.json"
    if not path.exists():
        start = time.process_time()
        rows = list(robustness.measure(protocol, folder))
        path.write_text(json.dumps({"seconds": time.process_time() - start, "rows": rows}))


def evaluate(protocol: Protocol, folder: Path, only: str | None, jobs: int, device: str) -> None:
    """All cells that are missing, seed by seed, and the robustness section."""
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [cell for cell in protocol.cells if only in (None, cell.network)]
    first, *others = protocol.seeds
    # A process for each network: what the libraries keep of one is gone with it.
    fresh = {"max_tasks_per_child": 1} if sys.version_info >= (3, 11) else {}
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), **fresh) as pool,
        tqdm(total=len(chosen) * len(protocol.seeds), desc="networks") as bar,
    ):

        def submit(seeds: Sequence[int]) -> list[Future[None]]:
            tasks = [
                pool.submit(work, cell, seed, protocol, folder, device)
                for seed in seeds
                for cell in reversed(chosen)
            ]
            for task in tasks:
                task.add_done_callback(lambda _: bar.update())
            return tasks

        def finish(tasks: Sequence[Future[None]]) -> None:
            wait(tasks, return_when=FIRST_EXCEPTION)
            if any(task.done() and task.exception() for task in tasks):
                pool.shutdown(cancel_futures=True)  # say so now, not after all the others
            for task in tasks:
                task.result()

        tasks = submit([first])
        later = submit(others[:-1])
        finish(tasks)
        # It reads the networks of the first seed, and would be alone at the end.
        if only is None:
            later.append(pool.submit(shake, protocol, folder))
        finish(later + submit(others[-1:]))
    note(folder, time.perf_counter() - start, jobs, device)


def note(folder: Path, seconds: float, jobs: int, device: str) -> None:
    """What the report says about the run; the seconds of parts of a run add up."""
    path = folder / "run.json"
    before = json.loads(path.read_text())["seconds"] if path.exists() else 0.0
    machine = f"{jobs} CPU cores, {platform.machine()}"
    if device != "cpu":
        machine = torch.cuda.get_device_name()
    known = {
        "seconds": before + seconds,
        "date": date.today().isoformat(),
        "command": " ".join(["python", "scripts/evaluate.py", *sys.argv[1:]]),
        "machine": machine,
        "versions": {name: version(name).split("+")[0] for name in PACKAGES},
    }
    path.write_text(json.dumps(known))


def own(arguments: argparse.Namespace, folder: Path, device: str) -> Protocol:
    """The one cell of pictures and weights that the user brings."""
    start = time.perf_counter()
    network = networks.pretrained(arguments.arch, arguments.weights)
    with torch.no_grad():
        outputs = network(torch.zeros(1, 3, arguments.size, arguments.size)).shape[1]
    pictures = data.folder(arguments.images, arguments.size, outputs)
    protocol = Protocol(
        "own",
        (Cell("own", "pictures", arguments.samples, 0, arguments.size),),
        seeds=(0,),
        width=1.0,
        depths=(),
        cancellation=(),
    )
    path = folder / "own-pictures-0.json"
    run.own_pictures(network, pictures, arguments.samples, protocol, path, device)
    note(folder, time.perf_counter() - start, os.cpu_count() or 1, device)
    return protocol


def really_trained(arguments: argparse.Namespace) -> None:
    """The networks that others trained, on the user's copies of pictures and weights."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder = arguments.results / "real"
    if not arguments.write:
        real_run.evaluate(Path(arguments.weights), arguments.pictures, folder, arguments.only)
    real_run.write(folder, (arguments.out or ROOT / "docs") / "evaluation.md")


def main(description: str) -> None:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the full protocol")
    parser.add_argument("--tiny", action="store_true", help="a minute, to see whether it runs")
    parser.add_argument("--only", metavar="NETWORK", help="only this network, say resnet50")
    parser.add_argument("--write", action="store_true", help="only write what is stored")
    parser.add_argument("--out", type=Path, help="folder for the document; docs/ if not given")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "evaluation")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=Path, help="an ImageFolder of your own")
    parser.add_argument("--arch", default="resnet50", help="torchvision's name of the network")
    parser.add_argument("--weights", default="DEFAULT", help="name or file; --real: a folder")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--samples", type=int, default=50, help="pictures of your own to explain")
    parser.add_argument("--real", action="store_true", help="really trained networks")
    parser.add_argument("--pictures", type=Path, default=Path("pictures"), help="for --real")
    arguments = parser.parse_args()

    if arguments.real:
        really_trained(arguments)
        return

    name = "full" if arguments.full else "tiny" if arguments.tiny else "reduced"
    template = ROOT / "evaluation" / "template.md"
    if arguments.images:
        folder = arguments.results / f"own-{arguments.arch}"
        folder.mkdir(parents=True, exist_ok=True)
        protocol, place = own(arguments, folder, arguments.device), folder
    else:
        protocol, folder = PROTOCOLS[name], arguments.results / name
        # docs/ shows the reduced and the full protocol; other runs stay with their results.
        place = folder if arguments.tiny else ROOT / "docs"
        if not arguments.write:
            jobs = arguments.jobs if arguments.device == "cpu" else 1
            evaluate(protocol, folder, arguments.only, jobs, arguments.device)
    report.write(protocol, folder, (arguments.out or place) / "evaluation-small.md", template)
