"""Models by name: torchvision's, timm's, Hugging Face's, or a function of the user's own."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError


@dataclass
class Source:
    """A model, and what belongs to it.

    Attributes:
        model: In eval mode.
        transform: From a picture (Pillow's, in RGB) to the model's input; None if not known.
        class_names: Of its outputs; None if not known.
        mean, std: By which `transform` normalises.
        tokenizer: Hugging Face's, for text.
        outputs: How many scores the model returns; None if not known.
    """

    model: nn.Module
    transform: Callable[[Any], Tensor] | None = None
    class_names: list[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    tokenizer: Any = None
    outputs: int | None = None


def load_model(name: str, weights: str | None = None, pixels: int | None = None) -> Source:
    """Build a model and load its weights.

    Args:
        name: ``resnet50`` (torchvision's), ``timm/…``, ``hf/…`` (a name on the Hub or a folder),
            or ``module:function``, which returns a model, or a pair of it and its transform.
        weights: A state-dict file; for torchvision the name of weights, for timm ``DEFAULT``.
            Not for Hugging Face's, whose names mean both.
        pixels: Side of the pictures, where the model tells none. 224 if None.

    Raises:
        InputError: If there is no such model, or the weights do not fit it.
    """
    if ":" in name and not Path(name).exists():
        source = _from_function(name)
    elif name.startswith("timm/"):
        source = _from_timm(name.removeprefix("timm/"), weights)
    elif name.startswith("hf/"):
        if weights is not None:
            raise InputError(
                f"{name} brings its weights along: leave --weights out, or name the folder that "
                "save_pretrained wrote them to (hf/FOLDER)."
            )
        source = _from_hugging_face(name.removeprefix("hf/"))
    else:
        source = _from_torchvision(name.removeprefix("torchvision/"), weights)
    if weights is not None and Path(weights).is_file():
        _load(source, Path(weights), name)
    if source.transform is None:
        source.transform = _plain_transform(pixels or 224)
    source.model.eval()
    return source


def count_outputs(source: Source, dataset: Any) -> int | None:
    """How many scores the model returns: tried on a sample where its weights do not tell."""
    for index in range(min(len(dataset), 4) if source.outputs is None else 0):
        # A broken picture; or a model that cannot take it, which the run says more clearly.
        with contextlib.suppress(Exception), torch.no_grad():
            inputs = dataset[index][0]
            parts = inputs if isinstance(inputs, tuple) else (inputs,)
            source.outputs = int(source.model(*(part[None] for part in parts)).shape[1])
            break
    return source.outputs


# ---- where models come from --------------------------------------------------------------------


def call_named(name: str) -> Any:
    """What ``module:function`` returns; modules beside the working directory are found, too."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{name}: module {module!r} cannot be imported: {error}.") from None
    made = getattr(found, function, None)
    if not callable(made):
        raise InputError(f"{name}: {module} has no function {function!r}.")
    return made()


def _from_function(name: str) -> Source:
    made = call_named(name)
    transform = None
    if isinstance(made, tuple) and len(made) == 2:
        made, transform = made
    if not isinstance(made, nn.Module):
        raise InputError(f"{name} returns a {type(made).__name__}, not a torch.nn.Module.")
    mean, std = _normalisation(transform)
    return Source(made, transform, mean=mean, std=std)


def _from_torchvision(name: str, weights: str | None) -> Source:
    models = _imported("torchvision.models", "torchvision")
    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=4)
        hint = (
            f"Did you mean {', '.join(close)}?" if close else "timm/NAME, hf/NAME, module:function?"
        )
        raise InputError(f"torchvision has no classifier {name!r}. {hint}")
    catalogue = models.get_model_weights(name)
    entry = catalogue["DEFAULT"]
    from_file = weights is not None and Path(weights).is_file()
    if from_file:
        state = read_state_dict(Path(str(weights)))
        count = number_of_outputs(state)
        extras: dict[str, Any] = {"num_classes": count}
    else:
        if weights not in catalogue.__members__:
            wrong = "It is not said which" if weights is None else f"{weights!r} is neither"
            raise InputError(
                f"{name} needs weights (--weights): a state-dict file, or one of "
                f"{', '.join(catalogue.__members__)}. {wrong}."
            )
        entry = catalogue[weights]
        count, extras = len(entry.meta["categories"]), {"weights": entry}
    if name in ("googlenet", "inception_v3") and from_file:
        # As torchvision builds them for its own weights, whose preprocessing we use; the auxiliary
        # classifiers serve training alone.
        aux = any(key.lower().startswith("aux") for key in state)
        extras |= {"aux_logits": aux, "transform_input": True, "init_weights": False}
    try:
        model = models.get_model(name, **extras)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{entry} cannot be fetched: {error}.") from None
    names = entry.meta.get("categories")
    transform = entry.transforms()
    mean, std = _normalisation(transform)
    names = names if names and len(names) == count else None
    return Source(model, transform, names, mean, std, outputs=count)


def _from_timm(name: str, weights: str | None) -> Source:
    timm = _imported("timm", "timm")
    from_file = weights is not None and Path(weights).is_file()
    if not from_file and weights != "DEFAULT":
        raise InputError(
            f"timm/{name} needs weights (--weights): DEFAULT or a state-dict file, not {weights!r}."
        )
    extras = {}
    if from_file:
        extras["num_classes"] = number_of_outputs(read_state_dict(Path(str(weights))))
    try:
        model = timm.create_model(name, pretrained=not from_file, **extras)
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(f"timm/{name} cannot be made: {_first_line(error)}.") from None
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    mean, std = list(config["mean"]), list(config["std"])
    return Source(model, transform, None, mean, std, outputs=model.num_classes)


def _from_hugging_face(name: str) -> Source:
    transformers = _imported("transformers", "transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kinds = " ".join(config.architectures or ())
        if "ImageClassification" in kinds:
            model = transformers.AutoModelForImageClassification.from_pretrained(name)
            processor = transformers.AutoImageProcessor.from_pretrained(name)
        elif "SequenceClassification" in kinds:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                name, attn_implementation="eager"
            )
            processor = transformers.AutoTokenizer.from_pretrained(name)
        else:
            raise InputError(f"hf/{name} is {kinds or 'of no known kind'}, not a classifier.")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"hf/{name} cannot be loaded: {_first_line(error)}.") from None
    labels = getattr(config, "id2label", None) or {}
    names = (
        [str(labels[i]) for i in range(len(labels))]
        if set(labels) == set(range(len(labels)))
        else None
    )
    if "SequenceClassification" in kinds:
        return Source(model, None, names, tokenizer=processor, outputs=config.num_labels)

    def transform(picture: Any) -> Tensor:
        return processor(picture, return_tensors="pt")["pixel_values"][0]

    mean, std = processor.image_mean, processor.image_std
    return Source(model, transform, names, mean, std, outputs=config.num_labels)


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"This model needs {package} (pip install {package}): {error}.") from None


def _normalisation(transform: Any) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Mean and deviation by which a transform of torchvision's normalises."""
    for step in [transform, *getattr(transform, "transforms", ())]:
        mean, std = getattr(step, "mean", None), getattr(step, "std", None)
        if mean is not None and std is not None:
            return [float(x) for x in mean], [float(x) for x in std]
    return None, None


def _plain_transform(pixels: int) -> Callable[[Any], Tensor]:
    """To a square of values from 0 to 1."""

    def transform(picture: Any) -> Tensor:
        from PIL import ImageOps

        square = ImageOps.fit(picture, (pixels, pixels))
        flat = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
        return flat.view(pixels, pixels, -1).permute(2, 0, 1).float() / 255

    return transform


# ---- state dicts -------------------------------------------------------------------------------


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, under the names that a plain module gives them."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the bytes lead it to
        raise InputError(
            f"{path} cannot be read as a state dict (only tensors are loaded, no pickled modules): "
            f"{_first_line(error)}"
        ) from None
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    found = content.items() if isinstance(content, Mapping) else ()
    state = {str(key): value for key, value in found if isinstance(value, Tensor)}
    if not state:
        raise InputError(f"{path} holds no state dict.")
    return {plain_key(key): value for key, value in state.items()}


def plain_key(key: str) -> str:
    """Without what DataParallel and torch.compile prepend, and as DenseNet is spelt today."""
    key = re.sub(r"^((module|_orig_mod)\.)+", "", key)
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", key)


def number_of_outputs(state: Mapping[str, Tensor]) -> int:
    """Rows of the last weight matrix: the final layer of every common classifier."""
    weights = [value for key, value in state.items() if key.endswith("weight") and value.ndim >= 2]
    if not weights:
        raise InputError("The weights hold no matrix that could be a final layer.")
    return len(weights[-1])


def _load(source: Source, path: Path, name: str) -> None:
    state, expected = read_state_dict(path), source.model.state_dict()
    optional = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = [key for key in expected if key not in state and key not in optional]
    surplus = [key for key in state if key not in expected]
    shapes = [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = [
        f"{len(items)} {what} ({', '.join(items[:3])}{' …' if len(items) > 3 else ''})"
        for what, items in (
            ("missing keys", missing),
            ("unexpected keys", surplus),
            ("wrong shapes", shapes),
        )
        if items
    ]
    if problems:
        raise InputError(f"{path} does not fit {name}: {'; '.join(problems)}.")
    source.model.load_state_dict(state, strict=False)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
