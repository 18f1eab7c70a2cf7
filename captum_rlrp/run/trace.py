"""Explanations recorded as lists of calls.

Rules decide by shapes, dtypes and places in memory, never by values: PyTorch's operations that run
for one task are those of every task alike. Written out as a function, they need none of the Python
that led to them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .program import Result
from .recording import Replay
from .task import Outcome, Start, Task

aten = torch.ops.aten

_LONGEST = 2**14  # lines, as of recurrent layers of very many steps: they take a second to compile
_WRITTEN = (type(None), bool, int, str)  # by their repr
_READS = {"numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage"}
# Values → the model's output, and, for the start that it is sent then, what comes of it.
_Function = Callable[[Iterable[Tensor]], Generator[Any, Start, None]]


def waits(func: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether an operation's result, or its shape, goes by values that the host reads."""
    if "index" in func._schema.name:  # a mask is turned into the places where it is True
        return any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return any(tag in func.tags for tag in tags)


def _is_same(view: Any, tensor: Any) -> bool:
    """Whether a view shows what the tensor does."""
    return (
        isinstance(view, Tensor)
        and isinstance(tensor, Tensor)
        and view.is_floating_point()  # complex ones may be conjugated
        and (view.shape, view.dtype) == (tensor.shape, tensor.dtype)
        and (view.stride(), view.storage_offset()) == (tensor.stride(), tensor.storage_offset())
    )


class _Reads(TorchFunctionMode):
    """Tells a trace of values that leave PyTorch without one of its operations."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _READS:
            self._trace.obstacle = func.__name__
        return func(*args, **(kwargs or {}))


@dataclass
class _Line:
    """One line of the function.

    Attributes:
        makes: What is on the left side.
        text: The expression on the right side.
        reads: The variables in it.
        stays: Whether it has to be there although nobody reads what it makes.
    """

    makes: list[str]
    text: str
    reads: Sequence[str] = ()
    stays: bool = False

    def written(self, frees: Sequence[str]) -> str:
        """As Python, with the variables that nobody reads any more."""
        left = ", ".join(self.makes)
        text = f"    {left} = {self.text}" if left else f"    {self.text}"
        return f"{text}; del {', '.join(frees)}" if frees else text


class Trace(TorchDispatchMode):
    """Writes down the operations that run in it.

    Attributes:
        obstacle: The first that another run might not do: it goes by values, or reads a tensor that
            was neither given nor made here. Or there are too many.
    """

    def __init__(self) -> None:
        super().__init__()
        self.obstacle: str | None = None
        self._reads = _Reads(self)
        self._lines: list[_Line] = []
        self._globals: dict[str, Any] = {}
        self._functions: dict[Any, str] = {}
        self._names: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._count = 0

    def __enter__(self) -> Trace:
        self._reads.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._reads.__exit__(*raised)

    def give(self, tensors: Iterable[Tensor]) -> None:
        """The arguments of the function."""
        self._lines.append(_Line([*map(self._named, tensors), ""], "given", stays=True))

    def ask(self, output: Tensor, start: Tensor, column: Tensor | None) -> None:
        """Between the halves of a task: from the output to the start."""
        makes = [self._named(start), "_" if column is None else self._named(column)]
        text, reads = self._text(output)
        self._lines.append(_Line(makes, f"yield {text}", reads, stays=True))

    def end(self, results: Sequence[Tensor | None]) -> _Function | None:
        """The function, which yields these at the end; None where there is an obstacle."""
        text, reads = self._text(list(results))
        if self.obstacle is not None:
            return None
        self._lines.append(_Line([], f"yield {text}", reads, stays=True))
        exec("def function(given):\n" + "\n".join(self._written()), self._globals)
        function: _Function = self._globals["function"]
        return function

    def _written(self) -> list[str]:
        """The lines that are of use, each with what can be freed behind it."""
        last: set[str] = set()
        written: list[str] = []
        for line in reversed(self._lines):
            made = {name for name in line.makes if name.startswith("v")}
            if line.stays or made & last:
                frees = {*line.reads, *made} - last
                last.update(line.reads)
                written.append(line.written(sorted(frees)))
        return written[::-1]

    def _named(self, tensor: Tensor) -> str:
        """A name for a tensor that is new here, or has become another."""
        name, self._count = f"v{self._count}", self._count + 1
        self._names[id(tensor)] = weakref.ref(tensor), name
        return name

    def _constant(self, value: Any) -> str:
        name = f"k{len(self._globals)}"
        self._globals[name] = value
        return name

    def _text(self, value: Any) -> tuple[str, list[str]]:
        """An argument as Python, and the variables in it."""
        if isinstance(value, Tensor):
            known, name = self._names.get(id(value), (None, ""))
            if known is None or known() is not value:
                self.obstacle = self.obstacle or "a tensor from elsewhere"
            return name, [name]
        if isinstance(value, (list, tuple)):
            items = [self._text(item) for item in value]
            text = "".join(f"{text}, " for text, _ in items)
            reads = [name for _, names in items for name in names]
            return (f"[{text}]" if isinstance(value, list) else f"({text})"), reads
        if type(value) in _WRITTEN or (type(value) is float and math.isfinite(value)):
            return repr(value), []
        return self._constant(value), []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.obstacle is None:
            self._write(func, args, kwargs, result)
        return result

    def _write(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """Adds a line."""
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        if waits(func, tensors) or len(self._lines) > _LONGEST:
            self.obstacle = str(func)
            return
        if func is aten.lift_fresh.default:  # of numbers that Python had; it may be written to
            text = f"{self._constant(args[0].clone())}.clone()"
            self._lines.append(_Line([self._named(result)], text))
            return
        if func.is_view and _is_same(result, args[0]):
            self._names[id(result)] = weakref.ref(result), self._text(args[0])[0]
            return
        pairs = [("", self._text(value)) for value in args]
        pairs += [(f"{name}=", self._text(value)) for name, value in kwargs.items()]
        arguments = ", ".join(f"{name}{text}" for name, (text, _) in pairs)
        reads = [name for _, (_, names) in pairs for name in names]
        if isinstance(result, Tensor):
            makes = [self._named(result)]
        elif isinstance(result, (list, tuple)):
            makes = [self._named(r) if isinstance(r, Tensor) else "_" for r in result] + [""]
        else:
            makes = []
        function = self._functions.setdefault(func, f"f{len(self._functions)}")
        self._globals[function] = func
        line = _Line(makes, f"{function}({arguments})", reads, stays=func._schema.is_mutable)
        self._lines.append(line)


class Traces:
    """Records tasks as functions.

    Attributes:
        capacity: How many are kept; they hold no tensors.
    """

    capacity = 64

    def key(self, task: Task) -> Hashable:
        """See :class:`.recording.Recorder`."""
        inputs = tuple((v.shape, v.stride(), v.dtype, v.device) for v in task.inputs.values())
        parameters = (task.values[node] for node in task.program.graph.parameters)
        strides = tuple(p.stride() if p.layout is torch.strided else None for p in parameters)
        settings = (
            torch.is_inference_mode_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.mkldnn.enabled,
        )
        return (task.program, task.batch, task.measure_delta, inputs, strides, settings)

    def record(self, task: Task) -> tuple[Outcome, Replay | None]:
        """See :class:`.recording.Recorder`."""
        trace = Trace()
        nodes = [node for node, value in task.values.items() if isinstance(value, Tensor)]
        trace.give(task.values[node] for node in nodes)
        try:
            with trace:
                run = task.forward()
            output = run.values[run.output]
            start, column = task.begin(output)
            trace.ask(output, start, column)
            with trace:
                result, totals = task.back(run, start, column)
        except NotImplementedError:  # of one that runs in no mode
            return task.run(), None
        found = result.relevance
        function = trace.end([*found.values(), result.delta, totals])
        if function is None:
            return (result, totals), None
        kinds, likes, wanted = _kinds(start, column), result.likes, list(found)

        def replay(task: Task) -> Outcome | None:
            run = function(task.values[node] for node in nodes)
            start = task.begin(next(run))
            if _kinds(*start) != kinds:
                return None
            *relevance, delta, totals = run.send(start)
            return Result(dict(zip(wanted, relevance, strict=True)), delta, likes), totals

        return (result, totals), replay


def _kinds(start: Tensor, column: Tensor | None) -> Hashable:
    return start.stride(), start.dtype, None if column is None else column.dtype
