"""The command ``captum-rlrp``: explain image files with a torchvision network.

Everything that can go wrong with what the user hands in ends as one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import __version__
from .attribution import RelativeLRP
from .cli_files import (
    CommandError,
    Report,
    UnreadableImageError,
    displayed,
    draw,
    file_names,
    first_line,
    read_image,
    write_report,
)
from .dataset.commands import add_parsers
from .errors import RelativeLRPError
from .kernels import show_config

PREDICTIONS = 5  # how many of the likeliest classes the JSON lists


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (CommandError, RelativeLRPError, OSError) as error:
        complain(str(error))
        return 2


def complain(message: str) -> None:
    """Say on stderr what went wrong, without disturbing a progress bar."""
    tqdm.write(f"captum-rlrp: error: {message}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """The options, with their help."""
    parser = argparse.ArgumentParser(
        prog="captum-rlrp", description="Relative LRP for PyTorch networks."
    )
    parser.add_argument("--version", action="version", version=f"captum-rlrp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    explain = commands.add_parser(
        "explain",
        help="explain what a torchvision network sees in images",
        description="Writes one heatmap (PNG) and one report (JSON) per image.",
    )
    explain.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    explain.add_argument("--arch", required=True, help="torchvision architecture, e.g. resnet50")
    explain.add_argument(
        "--weights",
        required=True,
        metavar="FILE|DEFAULT|NAME",
        help="state-dict file, or the name of torchvision weights (downloaded once)",
    )
    explain.add_argument(
        "--target",
        type=target_index,
        default="auto",
        metavar="auto|N",
        help="class to explain; auto (the default) is the likeliest one",
    )
    explain.add_argument("--out", required=True, type=Path, metavar="DIR")
    explain.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="class names, one per line (default: those of torchvision's weights, if as many)",
    )
    explain.add_argument("--device", default="auto", help="auto (the default), cpu, cuda, cuda:1 …")
    explain.set_defaults(run=run_explain)

    add_parsers(commands)

    doctor = commands.add_parser("doctor", help="say which versions and kernels run here, and why")
    doctor.set_defaults(run=run_doctor)
    return parser


def target_index(text: str) -> int | None:
    """``auto`` as None, else the number of a class."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number") from None


# --- doctor -------------------------------------------------------------------------------------


def run_doctor(options: argparse.Namespace) -> int:
    """Print versions, the kernels in use and the reason."""
    config = {"captum-rlrp": __version__, **show_config()}
    width = max(map(len, config))
    for name, value in config.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key}: {part}" for key, part in value.items())
        print(f"{name:<{width}}  {value}")
    return 0


# --- explain ------------------------------------------------------------------------------------


@dataclass
class Classifier:
    """A network, and what its weights say about how to use it."""

    model: nn.Module
    preprocess: Callable[[Any], Tensor]
    class_names: list[str] | None

    def name(self, index: int) -> str | None:
        """What the class is called, where that is known."""
        return self.class_names[index] if self.class_names else None


def run_explain(options: argparse.Namespace) -> int:
    """Explain every image; one that cannot be read is reported and skipped (exit code 2)."""
    missing = [str(path) for path in options.images if not path.is_file()]
    if missing:
        raise CommandError(f"no such image: {listing(missing)}")
    device = find_device(options.device)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write to {options.out}: {error.strerror}") from None
    classifier = load_classifier(options.arch, options.weights, options.classes)
    classifier.model.to(device)
    method = RelativeLRP(classifier.model)

    code = 0
    names = file_names(options.images, options.out)
    for path, name in tqdm(list(zip(options.images, names, strict=True)), unit="image"):
        try:
            image = classifier.preprocess(read_image(path))[None].to(device)
            with torch.no_grad():
                logits = classifier.model(image)[0].double()
            target = pick_target(options, logits)
            start = time.perf_counter()
            attribution, delta = method.attribute(
                image, target=target, return_convergence_delta=True
            )
            total, violation = attribution.abs().sum().item(), delta.item()  # waits for the device
            seconds = time.perf_counter() - start
        except UnreadableImageError as error:
            complain(str(error))
            code = 2
            continue
        heatmap = options.out / f"{name}.png"
        probabilities = logits.softmax(0)
        report = Report(
            image=str(path),
            heatmap=heatmap.name,
            arch=options.arch,
            weights=options.weights,
            target=target,
            class_name=classifier.name(target),
            logit=logits[target].item(),
            probability=probabilities[target].item(),
            sum_abs_relevance=total,
            delta=violation,
            seconds=round(seconds, 4),
            predictions=[
                {
                    "target": index,
                    "class_name": classifier.name(index),
                    "logit": logits[index].item(),
                    "probability": probabilities[index].item(),
                }
                for index in logits.topk(min(PREDICTIONS, len(logits))).indices.tolist()
            ],
        )
        draw(heatmap, report, attribution[0], displayed(image[0], classifier.preprocess))
        write_report(options.out / f"{name}.json", report)
    return code


def find_device(name: str) -> torch.device:
    """The device of that name, checked to be there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"device {name!r} cannot be used: {first_line(error)}") from None
    return device


def pick_target(options: argparse.Namespace, logits: Tensor) -> int:
    """The class asked for, or the likeliest one."""
    if options.target is None:
        return int(logits.argmax())
    if not 0 <= options.target < len(logits):
        raise CommandError(
            f"--target {options.target} is out of range: {options.arch} with these weights has "
            f"{len(logits)} classes, 0 to {len(logits) - 1}"
        )
    return int(options.target)


# --- networks -----------------------------------------------------------------------------------


def load_classifier(arch: str, weights: str, classes: Path | None) -> Classifier:
    """Build the network, load its weights, and collect what belongs to them."""
    try:
        from torchvision import models  # an optional dependency
    except ImportError as error:
        raise CommandError(
            f"explain needs torchvision (pip install torchvision): {first_line(error)}"
        ) from None

    known = models.list_models(module=models)
    if arch not in known:
        close = difflib.get_close_matches(arch.lower(), known, n=4)
        hint = f"; did you mean {', '.join(close)}?" if close else f"; known: {', '.join(known)}"
        raise CommandError(f"torchvision has no architecture {arch!r}{hint}")
    catalogue = models.get_model_weights(arch)

    file = Path(weights)
    if file.is_file():
        model, entry = load_from_file(arch, file), catalogue["DEFAULT"]
        count = number_of_classes(model.state_dict())
    elif weights in catalogue.__members__:
        entry = catalogue[weights]
        try:
            model = models.get_model(arch, weights=entry)
        except (OSError, RuntimeError) as error:
            raise CommandError(f"cannot fetch {entry}: {first_line(error)}") from None
        count = len(entry.meta["categories"])
    else:
        raise CommandError(
            f"--weights {weights!r} is neither a file nor weights of {arch}, which are: "
            + ", ".join(catalogue.__members__)
        )

    names = entry.meta.get("categories")
    if classes is not None:
        names = read_class_names(classes)
        if len(names) != count:
            raise CommandError(f"{classes} names {len(names)} classes; the network has {count}")
    elif len(names or ()) != count:
        names = None
    return Classifier(model.eval(), entry.transforms(), names)


def read_class_names(path: Path) -> list[str]:
    """One name per line."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"cannot read the class names in {path}: {first_line(error)}") from None


def load_from_file(arch: str, path: Path) -> nn.Module:
    """The architecture with the weights of a state-dict file, and as many classes as those have."""
    from torchvision import models

    state = read_state_dict(path)
    count = number_of_classes(state)
    if count is None:
        raise CommandError(f"{path} holds no weight of a final layer")
    extras: dict[str, Any] = {}
    if arch in ("googlenet", "inception_v3"):
        # As torchvision builds them for its own weights, whose preprocessing we use; the auxiliary
        # classifiers serve training alone.
        extras = {
            "aux_logits": any(key.lower().startswith("aux") for key in state),
            "transform_input": True,
            "init_weights": False,
        }
    model: nn.Module = models.get_model(arch, weights=None, num_classes=count, **extras)
    expected = model.state_dict()
    misfit = describe_misfit(expected, state)
    if misfit:
        raise CommandError(f"{path} does not fit {arch}: {misfit}")
    # Not strict about the counters that files from before batch norm had them lack.
    model.load_state_dict(state, strict=False)
    return model


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, under the names that a plain module gives them."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the bytes lead it to
        raise CommandError(
            f"cannot read {path} as a state dict (only tensors are loaded, no pickled modules): "
            f"{first_line(error)}"
        ) from None
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise CommandError(f"{path} holds a {type(content).__name__}, not a state dict")
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise CommandError(f"{path} holds no tensors")
    return {plain_key(key): value for key, value in state.items()}


def plain_key(key: str) -> str:
    """Without what DataParallel and torch.compile prepend, and as DenseNet is spelt today."""
    key = re.sub(r"^((module|_orig_mod)\.)+", "", key)
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", key)


def number_of_classes(state: Mapping[str, Tensor]) -> int | None:
    """Outputs of the last weight matrix, the final layer in every torchvision classifier."""
    weights = [value for key, value in state.items() if key.endswith("weight") and value.ndim >= 2]
    return len(weights[-1]) if weights else None


def describe_misfit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Which keys and shapes differ; empty if none does."""
    missing = [
        key for key in expected if key not in found and not key.endswith("num_batches_tracked")
    ]
    surplus = [key for key in found if key not in expected]
    shapes = [
        f"{key} is {tuple(found[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    parts = [
        f"{len(items)} {what} ({listing(items)})"
        for what, items in (
            ("missing keys", missing),
            ("unexpected keys", surplus),
            ("wrong shapes", shapes),
        )
        if items
    ]
    return "; ".join(parts)


# --- text ---------------------------------------------------------------------------------------


def listing(items: Sequence[str], most: int = 4) -> str:
    """The items in one line, cut short."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" * (len(items) > most))


if __name__ == "__main__":
    sys.exit(main())
