"""Every network of torchvision: does Relative LRP explain it, and what do others do with it?

Each model runs in a process of its own and its row is written to a file at once, so that a run that
was cut short goes on where it stopped::

    python scripts/coverage.py                       # all that is missing, then docs/coverage.md
    python scripts/coverage.py --only resnet18 vit   # by name or the beginning of a name
    python scripts/coverage.py --sample 12           # the smallest ones
    python scripts/coverage.py --again               # forget earlier rows
    python scripts/coverage.py --write               # only write the document
    python scripts/coverage.py --peers               # what others do, where a row does not have it
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Collection
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import families
import torch
import torchvision
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "build" / "coverage"
DOCUMENT = ROOT / "docs" / "coverage.md"

VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")
SEGMENTATION = ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
FAMILIES = ("classification", "video", "segmentation")

# The smallest legal input where it is not 64 pixels; vision transformers fix theirs.
SIZES = {"alexnet": 63, "inception_v3": 75, "squeezenet": 32, "vit_h_14": 224, "vit": 224,
         "maxvit_t": 224}  # fmt: skip

PEERS = ("captum", "zennit", "autolrp")

TOLERANCE = 1e-4  # for the delta, and for reference against compiled


def names() -> list[str]:
    """All models, by number of parameters."""
    listed = torchvision.models.list_models(module=torchvision.models)
    size = {n: torchvision.models.get_model_weights(n).DEFAULT.meta["num_params"] for n in listed}
    return [*sorted(listed, key=size.__getitem__), *VIDEO, *SEGMENTATION]


def family(name: str) -> str:
    return "video" if name in VIDEO else "segmentation" if name in SEGMENTATION else FAMILIES[0]


class OnlyOut(nn.Module):
    """Of the dict that a segmentation network returns, the map of scores."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)["out"]


def build(name: str) -> nn.Module:
    arguments: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False
    if name in SEGMENTATION:
        arguments["weights_backbone"] = None
        if name != "lraspp_mobilenet_v3_large":
            arguments["aux_loss"] = False
    model = torchvision.models.get_model(name, **arguments)
    if name in ("googlenet", "inception_v3"):
        model.aux_logits = False
    return OnlyOut(model) if name in SEGMENTATION else model


def randomise(model: nn.Module) -> nn.Module:
    """Weights as after training: no statistic at its default, no layer at zero."""
    generator = torch.Generator().manual_seed(0)

    def normal(value: Tensor, mean: float, std: float) -> None:
        value.copy_(torch.randn(value.shape, generator=generator) * std + mean)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                normal(module.running_mean, 0, 0.1)
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator))
                module.running_var.add_(0.5)
                if module.affine:
                    normal(module.weight, 1, 0.1)
                    normal(module.bias, 0, 0.1)
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                normal(parameter, 0.5, 0.1)
            elif parameter.abs().max() == 0:
                normal(parameter, 0, 0.02 if parameter.dim() > 1 else 0.1)
    return model.eval()


def example(name: str) -> Tensor:
    size = next((s for key, s in SIZES.items() if name == key), None)
    size = size or next((s for key, s in SIZES.items() if name.startswith(key)), 64)
    generator = torch.Generator().manual_seed(1)
    if family(name) == "video":
        size, frames = (224, 16) if name == "s3d" else (32, 4)
        return torch.randn(2, 3, frames, size, size, generator=generator)
    return torch.randn(2, 3, size, size, generator=generator)


# ---- one model ---------------------------------------------------------------------------------


def examine(name: str) -> dict[str, Any]:
    """The row of one model."""
    from captum_rlrp import RelativeLRP
    from captum_rlrp.kernels import extension

    model, x = randomise(build(name)), example(name)
    with torch.no_grad():
        target = top_class(name, model(x))
    row: dict[str, Any] = {"name": name, "family": family(name), "input": list(x.shape[1:])}
    row["parameters"] = sum(p.numel() for p in model.parameters())

    rlrp = RelativeLRP(model)
    engine = rlrp._engine
    begin = time.perf_counter()
    row["ops"] = len(engine.captured((x,), 1, len(x)).program.graph.nodes)
    row["capture"] = time.perf_counter() - begin
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        attribution = rlrp.attribute(x, target)
        seconds.append(time.perf_counter() - begin)
    row["explain"] = min(seconds)
    _, delta = rlrp.attribute(x, target, return_convergence_delta=True)
    mass = attribution.double().abs().flatten(1).sum(1)
    row["mass"], row["delta"] = mass.tolist(), delta.max().item()
    row["finite"] = bool(attribution.isfinite().all())
    row["compiled"] = extension.available()

    plain = RelativeLRP(model, backend="reference").attribute(x, target)
    scale = plain.abs().flatten(1).amax(1)
    row["difference"] = ((attribution - plain).abs().flatten(1).amax(1) / scale).max().item()
    if row["difference"] > TOLERANCE:
        # The kernels by themselves, on the reference's forward: a fused one rounds otherwise.
        unfused = RelativeLRP(model)
        unfused._engine.fuses = False
        apart = unfused.attribute(x, target) - plain
        row["kernels"] = (apart.abs().flatten(1).amax(1) / scale).max().item()
        # And what rounding alone makes of it: one sample by itself goes through other sums.
        alone = RelativeLRP(model, backend="reference").attribute(x[:1], target[:1])
        row["rounding"] = ((alone - plain[:1]).abs().max() / scale[0]).item()
    del rlrp, engine

    row.update(peers(name, model, x, target, PEERS))
    row["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return row


def top_class(name: str, output: Tensor) -> Any:
    """A score of each sample that is surely not 0; of one pixel, in segmentation."""
    if family(name) != "segmentation":
        return output.argmax(1).tolist()
    return [(c, 1, 2) for c in output[..., 1, 2].argmax(1).tolist()]


def peers(
    name: str, model: nn.Module, x: Tensor, target: Any, chosen: Collection[str]
) -> dict[str, str]:
    """What other packages do with the model."""
    runs = {
        "captum": lambda: by_captum(model, x, target),
        "zennit": lambda: by_zennit(name, model, x, target),
        "autolrp": lambda: by_autolrp(model, x, target),
    }
    return {peer: verdict(runs[peer]) for peer in chosen}


def by_peer(name: str, peer: str) -> str:
    """What one other package does with the model."""
    model, x = randomise(build(name)), example(name)
    with torch.no_grad():
        target = top_class(name, model(x))
    return peers(name, model, x, target, [peer])[peer]


def add_peers(name: str, file: Path, timeout: float) -> None:
    """Completes a row by what other packages do with the model, each in a process of its own."""
    row = json.loads(file.read_text())
    missing = [peer for peer in PEERS if peer not in row]
    if "error" in row:
        return
    for peer in missing:
        try:
            row[peer] = apart("--examine", name, "--peer", peer, timeout=timeout)
        except RuntimeError as error:
            row[peer] = str(error)
        file.write_text(json.dumps(row, indent=1))
        print(name, peer, row[peer], flush=True)


def verdict(run: Callable[[], tuple[Tensor, Tensor]]) -> str:
    """In a word or two, what came out: relevances summing up to the score, or what else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            relevance, score = run()
    except ModuleNotFoundError:
        return "not installed"
    except Exception as error:
        text = " ".join(str(error).split())
        return f"raises {type(error).__name__}: {text[:90]}"
    if not relevance.isfinite().all():
        return "non-finite"
    ratio = relevance.double().flatten(1).sum(1) / score.double()
    if not ratio.isfinite().all():
        return "non-finite"
    worst = ratio[(ratio - 1).abs().argmax()].item()
    return f"Σ R / score = {worst:.3g}"


def by_captum(model: nn.Module, x: Tensor, target: Any) -> tuple[Tensor, Tensor]:
    from captum.attr import LRP

    relevance = LRP(model).attribute(x, target)
    return relevance, scores(model, x, target)


def by_zennit(name: str, model: nn.Module, x: Tensor, target: Any) -> tuple[Tensor, Tensor]:
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlus
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    canonizers = []
    if name.startswith(("resnet", "resnext", "wide_resnet")):
        canonizers = [ResNetCanonizer()]
    elif name.startswith("vgg"):
        canonizers = [VGGCanonizer()]
    chosen = scores(model, x, target)

    def start(output: Tensor) -> Tensor:
        mask = torch.zeros_like(output)
        for i, t in enumerate(target):
            mask[(i, *t) if isinstance(t, tuple) else (i, t)] = 1
        return output.detach() * mask

    with Gradient(model, EpsilonPlus(canonizers=canonizers)) as attributor:
        _, relevance = attributor(x.clone().requires_grad_(), start)
    return relevance, chosen


def by_autolrp(model: nn.Module, x: Tensor, target: Any) -> tuple[Tensor, Tensor]:
    import autolrp

    wrapped = autolrp.tensor(x.clone())
    output = model(wrapped)
    chosen = torch.stack(
        [output[(i, *t) if isinstance(t, tuple) else (i, t)] for i, t in enumerate(target)]
    )
    chosen.sum().lrp()
    return wrapped.relevance, scores(model, x, target)


def scores(model: nn.Module, x: Tensor, target: Any) -> Tensor:
    with torch.no_grad():
        output = model(x)
    return torch.stack(
        [output[(i, *t) if isinstance(t, tuple) else (i, t)] for i, t in enumerate(target)]
    )


# ---- all of them -------------------------------------------------------------------------------


def apart(*arguments: str, timeout: float) -> Any:
    """What this script prints in a process of its own; an error says why that is nothing."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"more than {timeout:.0f} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
        raise RuntimeError(lines[-1][:200])
    return json.loads(done.stdout.splitlines()[-1])


def run(name: str, timeout: float) -> dict[str, Any]:
    """Examines a model in a process of its own."""
    try:
        row: dict[str, Any] = apart("--examine", name, timeout=timeout)
    except RuntimeError as error:
        return {"name": name, "family": family(name), "error": str(error)}
    return row


def passes(row: dict[str, Any]) -> bool:
    return (
        "error" not in row
        and row["finite"]
        and row["delta"] <= TOLERANCE
        and row.get("kernels", row["difference"]) <= TOLERANCE
        and max(row["mass"]) <= 1 + TOLERANCE
    )


HEAD = """\
# Coverage

Every classification builder of torchvision, and its video and segmentation networks, at their real
architecture with the smallest legal input, a batch of 2, random weights, random batch-norm
statistics, and random values where torchvision starts at zero (heads, layer scales). The target is
the top class of each sample. Written by `scripts/coverage.py` (`make coverage`) on {date},
torch {torch}, torchvision {torchvision}, one CPU thread, other work on the machine: the
seconds are for orientation.

**{good} of {all} pass**: captured, finite, delta at most 1e-4 in float32, Σ|R| at most 1, and the
compiled kernels within 1e-4 of the reference.{run}

* *ops*: calls in the captured graph. *capture*: seconds for the first call, once per model and
  input size. *explain*: seconds for the batch of 2 afterwards.
* *Σ|R|*: smallest in the batch. *delta*: largest in the batch.
* *agree*: largest difference between reference and compiled backend, over the largest relevance.
  Where that is above 1e-4, the brackets say what it comes from: the same for the kernels alone, on
  the reference's forward, and what rounding alone does to the reference (a sample by itself against
  the same sample in the batch). Deep random networks amplify rounding: a ReLU at 0 or a near tie at
  a max pool falls one way or the other.
* *Captum LRP* {captum} (default rules), *zennit* {zennit} (`EpsilonPlus`, with its canonizers for
  VGG and ResNet) and *autolrp* {autolrp} (its default), each the newest to be had: the error, or
  Σ R over the score, the worse of the two samples. It is 1 where relevance is conserved, and
  differs where biases and ε take a part: "works" means that it is between 1/2 and 2, "not
  conserving" that it is of another size or sign. Neither says how good the explanation is.
"""


def document(rows: dict[str, dict[str, Any]], listed: list[str]) -> str:
    missing = [name for name in listed if name not in rows]
    good = [name for name in listed if name in rows and passes(rows[name])]
    run = f" {len(missing)} did not run." if missing else ""
    apart = [n for n in listed if n in rows and not passes(rows[n])]
    run += f" Ran, but not all of it holds: {', '.join(apart)}." if apart else ""
    lines = [
        HEAD.format(
            date=date.today().isoformat(), torch=torch.__version__, run=run, all=len(listed),
            torchvision=torchvision.__version__, good=len(good), **versions(),
        )
    ]  # fmt: skip
    for kind in FAMILIES:
        lines += [
            f"## {kind.capitalize()}",
            "",
            "| model | input | ops | capture | explain | Σ\\|R\\| | delta | agree | Captum LRP "
            "| zennit | autolrp |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name in sorted(n for n in listed if family(n) == kind and n in rows):
            row = rows[name]
            if "error" in row:
                lines.append(f"| {name} | | | | | | | **{_cell(row['error'])}** | | | |")
                continue
            agree = f"{row['difference']:.0e}"
            if row["difference"] > TOLERANCE:
                kernels = f"{row['kernels']:.0e}" if "kernels" in row else "not measured"
                agree += f" (kernels {kernels}, rounding {row['rounding']:.0e})"
            failed, size = "" if passes(row) else " **not all**", "×".join(map(str, row["input"]))
            lines.append(
                f"| {name}{failed} | {size} | {row['ops']} | {row['capture']:.1f} "
                f"| {row['explain']:.2f} | {min(row['mass']):.2g} | {row['delta']:.0e} | {agree} "
                + "".join(f"| {_judged(row.get(peer, 'not run'))} " for peer in PEERS)
                + "|"
            )
        lines.append("")
    if missing:
        lines += ["## Not run", "", ", ".join(missing), ""]
    lines.append(families.section(DOCUMENT))
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Those of the other packages."""
    found = {}
    for peer in PEERS:
        try:
            found[peer] = version(peer)
        except PackageNotFoundError:
            found[peer] = "(not installed)"
    return found


def _judged(text: str) -> str:
    if not text.startswith("Σ"):
        return _cell(text)
    ratio = float(text.rsplit("= ", 1)[1])
    return f"{'works' if 0.5 <= ratio <= 2 else 'not conserving'} ({ratio:.2g})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace(str(ROOT), "…")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="models whose names begin so")
    parser.add_argument("--sample", type=int, metavar="N", help="the N smallest")
    parser.add_argument("--again", action="store_true", help="run what has a row already")
    parser.add_argument("--write", action="store_true", help="only write the document")
    parser.add_argument("--peers", action="store_true", help="complete rows by other packages")
    parser.add_argument(
        "--timeout", type=float, default=900, metavar="S", help="per model, or per other package"
    )
    parser.add_argument("--examine", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.examine:
        torch.set_num_threads(1)
        name, peer = options.examine, options.peer
        print(json.dumps(by_peer(name, peer) if peer else examine(name)))
        return

    listed = names()
    chosen = [] if options.write else listed
    if options.only:
        chosen = [n for n in chosen if n.startswith(tuple(options.only))]
    if options.sample:
        chosen = chosen[: options.sample]
    ROWS.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        file = ROWS / f"{name}.json"
        if options.peers:
            add_peers(name, file, options.timeout)
            continue
        if file.exists() and not options.again:
            continue
        row = run(name, options.timeout)
        file.write_text(json.dumps(row, indent=1))
        mark = "ok  " if passes(row) else "FAIL"
        print(mark, name, row.get("error") or f"delta {row['delta']:.0e}", flush=True)
    rows = {f.stem: json.loads(f.read_text()) for f in ROWS.glob("*.json")}
    DOCUMENT.write_text(document(rows, listed))


if __name__ == "__main__":
    main()
