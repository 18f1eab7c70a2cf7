"""How a model is called, and which of what it returns is explained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import InputError

Output = str | int | Callable[[Any], Any] | None


@dataclass(frozen=True)
class Form:
    """The form of a call.

    Attributes:
        output: Which of the model's outputs to explain: a name, an index, or a function that takes
            what the model returns. None where it returns one tensor.
        names: Names of the first arguments, which then go to forward by name.
        in_dict: Whether the named arguments go to forward as one dict instead.
        region: A class, of whose scores the sum under a mask is explained; the mask is the last
            argument then.
    """

    output: Output = None
    names: tuple[str, ...] = ()
    in_dict: bool = False
    region: int | None = None

    def call(self, model: nn.Module, args: Sequence[Any]) -> Tensor:
        """The output to explain."""
        count = len(self.names)
        named = dict(zip(self.names, args[:count], strict=True))
        rest = args[count:] if self.region is None else args[count:-1]
        returned = model(named, *rest) if self.in_dict else model(*rest, **named)
        output = self.pick(returned, type(model).__name__)
        if self.region is None:
            return output
        scores = output[:, self.region]
        return (scores * args[-1].to(scores.dtype)).flatten(1).sum(1)

    def pick(self, returned: Any, model: str) -> Tensor:
        """The output to explain, of what the model returned.

        Raises:
            InputError: If there is no such output, or several and none was chosen.
        """
        if callable(self.output):
            chosen = self.output(returned)
        elif self.output is not None:
            chosen = _item(returned, self.output, model)
        else:
            chosen = _only(returned, model)
        if not isinstance(chosen, Tensor):
            what = "its function" if callable(self.output) else repr(self.output)
            raise InputError(
                f"output={what} of {model} is no tensor but a {type(chosen).__name__}. "
                f"{_choices(returned)}"
            )
        return chosen


PLAIN = Form()
"""Positional arguments, and one tensor for an output."""


def _only(returned: Any, model: str) -> Any:
    """The one tensor of floating-point numbers among the outputs, or a classifier's logits."""
    if isinstance(returned, Tensor):
        return returned
    outputs = _outputs(returned)
    tensors = {name: v for name, v in outputs.items() if isinstance(v, Tensor)}
    unique = {id(v): v for v in tensors.values()}
    if len(unique) == 1 and len(tensors) >= 1:
        return next(iter(unique.values()))
    # What every model output of Hugging Face's with a head calls its scores.
    if isinstance(returned, Mapping) and "logits" in tensors and hasattr(returned, "to_tuple"):
        return tensors["logits"]
    raise InputError(
        f"{model} returns {len(tensors)} tensors; an explanation needs one. {_choices(returned)}"
    )


def _item(returned: Any, output: str | int, model: str) -> Any:
    outputs = _outputs(returned)
    if output in outputs:
        return outputs[output]
    if isinstance(output, int):
        values = list(outputs.values())
        if -len(values) <= output < len(values):
            return values[output]
    raise InputError(f"{model} has no output {output!r}. {_choices(returned)}")


def _outputs(returned: Any) -> dict[Any, Any]:
    if isinstance(returned, Mapping):
        return dict(returned)
    if hasattr(returned, "_fields"):
        return dict(zip(returned._fields, returned, strict=True))
    if isinstance(returned, (list, tuple)):
        return dict(enumerate(returned))
    if dataclasses.is_dataclass(returned):
        fields = dataclasses.fields(returned)
        return {field.name: getattr(returned, field.name) for field in fields}
    return {} if returned is None else {0: returned}


def _choices(returned: Any) -> str:
    outputs = _outputs(returned)
    if not outputs:
        return "It returns nothing that could be explained."
    listed = ", ".join(
        f"{name!r} {tuple(v.shape) if isinstance(v, Tensor) else f'({type(v).__name__})'}"
        for name, v in outputs.items()
    )
    return f"Choose one by RelativeLRP(model, output=…), a name, an index or a function: {listed}."
