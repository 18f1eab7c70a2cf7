"""A second tree of modules that shares every tensor with the user's, and nothing that changes.

Capture runs the model's forward on tensors without values. The user's modules, hooks and the
containers these write to must never see those, so the forward that runs is that of a twin.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import types
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .form import Form

aten = torch.ops.aten

_CONTAINERS = (dict, list, set, collections.OrderedDict, collections.defaultdict, collections.deque)
_DEEPEST = 6  # objects within objects
_LONGEST = 10_000  # a container with more items than that is data, not a place to keep activations


ROOT = "model"
"""The name of the model's twin in the module that calls it."""


class Root(nn.Module):
    """Calls a model's twin in a certain form, and returns the one tensor to explain."""

    def __init__(self, model: nn.Module, form: Form) -> None:
        super().__init__()
        self.model = model
        self.form = form
        self.training = model.training

    def forward(self, *args: Any) -> Tensor:
        return self.form.call(self.model, args)


def twin(
    model: nn.Module,
    form: Form,
    layers: Collection[nn.Module] = (),
    own_buffers: bool = False,
) -> Root:
    """The twin of a model, under a root that calls it.

    Args:
        model: The model, left as it is.
        form: How it is called, and which of its outputs counts.
        layers: Modules whose outputs must be values of their own, even where they return what
            they were given (``nn.Identity``).
        own_buffers: Whether the twin has copies of the buffers, for a forward that is to run on
            real tensors and may write to them.
    """
    return Root(_Twins(model, layers, own_buffers).of(model), form)


class _Twins:
    """Object → its twin; each object has one, however often it is met."""

    def __init__(self, model: nn.Module, layers: Collection[nn.Module], own_buffers: bool) -> None:
        self._layers = layers
        self._own_buffers = own_buffers
        self._depth = 0
        # Objects are kept along with their twins, for an id must not come again meanwhile.
        self._known: dict[int, tuple[Any, Any]] = {}
        self._owners = {id(owner): owner for m in model.modules() for owner in _hook_owners(m)}

    def of(self, value: Any) -> Any:
        """The twin of what can be told apart; anything else itself."""
        if id(value) in self._known:
            return self._known[id(value)][1]
        if isinstance(value, nn.Module):
            return self._module(value)
        if type(value) in _CONTAINERS:
            return self._container(value)
        if type(value) is tuple:
            items = tuple(map(self.of, value))
            return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
        if isinstance(value, types.MethodType):
            owner = self.of(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if type(value) is functools.partial:
            keywords = {name: self.of(v) for name, v in value.keywords.items()}
            made = functools.partial(self.of(value.func), *map(self.of, value.args), **keywords)
            made.__dict__.update(value.__dict__)
            return self._note(value, made)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if id(value) in self._owners or _is_plain_object(value):
            return self._object(value)
        return value

    def _note(self, value: Any, made: Any) -> Any:
        self._known[id(value)] = (value, made)
        return made

    def _module(self, module: nn.Module) -> nn.Module:
        made: nn.Module = self._note(module, object.__new__(type(module)))
        for name, value in module.__dict__.items():
            if name == "_modules":
                made.__dict__[name] = {
                    key: None if child is None else self.of(child) for key, child in value.items()
                }
            elif name == "_buffers" and self._own_buffers:
                made.__dict__[name] = {
                    key: None if buffer is None else buffer.detach().clone()
                    for key, buffer in value.items()
                }
            elif name in ("_parameters", "_buffers"):
                made.__dict__[name] = {key: self._tensor(tensor) for key, tensor in value.items()}
            elif name == "config":
                made.__dict__[name] = self._config(value)
            else:
                made.__dict__[name] = self.of(value)
        if module in self._layers:
            made.__dict__["forward"] = _with_outputs_of_its_own(made.forward)
        if isinstance(made, nn.RNNBase) and not self._own_buffers:
            # It would read the number of samples as a constant. The trial has checked already.
            made.__dict__["check_forward_args"] = lambda *args: None
        _open_exported(made)
        return made

    def _tensor(self, tensor: Tensor | None) -> Tensor | None:
        """The tensor itself, but for one made in inference mode, which export cannot hold."""
        if tensor is None or not tensor.is_inference():
            return tensor
        if id(tensor) not in self._known:
            with torch.inference_mode(False):
                made = tensor.clone()
                is_parameter = isinstance(tensor, nn.Parameter)
                self._note(tensor, nn.Parameter(made, False) if is_parameter else made)
        return self._known[id(tensor)][1]

    def _container(self, value: Any) -> Any:
        if len(value) > _LONGEST:
            return value
        made = self._note(value, copy.copy(value))
        if isinstance(value, dict):
            for key, item in value.items():
                made[key] = self.of(item)
        elif isinstance(value, list):
            made[:] = map(self.of, value)
        return made

    def _config(self, value: Any) -> Any:
        """A language model's settings, less what no graph can hold and no explanation needs.

        That is the cache for generation, and experts that run on tokens sorted by expert.
        """
        changes: dict[str, Any] = {}
        if getattr(value, "use_cache", False) is True:
            changes["use_cache"] = False
        if getattr(value, "_experts_implementation", None) == "grouped_mm":
            changes["_experts_implementation"] = "batched_mm"
        if not changes:
            return self.of(value)
        made = self._note(value, copy.copy(value))
        for name, setting in changes.items():
            setattr(made, name, setting)
        return made

    def _function(self, function: types.FunctionType) -> Any:
        """A hook or a patched forward that reaches modules or containers from where it was made."""
        names = set(_global_names(function.__code__))
        shared = {
            name: value
            for name, value in function.__globals__.items()
            if name in names and type(value) in _CONTAINERS
        }
        if not function.__closure__ and not shared:
            return function
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        namespace = function.__globals__
        if shared:
            namespace = {**namespace, **{name: self.of(value) for name, value in shared.items()}}
        made = self._note(
            function,
            types.FunctionType(
                function.__code__, namespace, function.__name__, function.__defaults__, cells
            ),
        )
        made.__kwdefaults__ = function.__kwdefaults__
        made.__dict__.update(function.__dict__)
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # still empty
                cell.cell_contents = self.of(original.cell_contents)
        return made

    def _object(self, value: Any) -> Any:
        """An object of the user's own, which may keep what forward hands it."""
        if self._depth >= _DEEPEST:
            return value
        try:
            made = copy.copy(value)
        except Exception:  # whatever its own way of being copied leads to
            return value
        if made is value or type(made) is not type(value):
            return value
        self._note(value, made)
        self._depth += 1
        for name, item in vars(value).items():
            made.__dict__[name] = self.of(item)
        self._depth -= 1
        return made


def _global_names(code: types.CodeType) -> list[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return [*code.co_names, *(name for c in inner for name in _global_names(c))]


def _hook_owners(module: nn.Module) -> list[Any]:
    """Objects of the user's own whose methods are hooks, or that hooks reach."""
    found = []
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    for hook in hooks:
        hook = hook.func if isinstance(hook, functools.partial) else hook
        reached = [getattr(hook, "__self__", None), hook if not _is_function(hook) else None]
        for cell in getattr(hook, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # still empty
                reached.append(cell.cell_contents)
        found += [value for value in reached if _is_plain_object(value)]
    return found


def _is_function(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType))


def _is_plain_object(value: Any) -> bool:
    kind: Any = type(value)
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (nn.Module, Tensor, type, types.ModuleType))
        and not _is_function(value)
        and kind.__reduce_ex__ is object.__reduce_ex__
        and not kind.__module__.startswith(("torch.", "builtins"))
    )


def _with_outputs_of_its_own(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = {id(x): x._version for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}

        def renew(x: Any) -> Any:
            unchanged = isinstance(x, Tensor) and given.get(id(x)) == x._version
            return aten.alias(x) if unchanged else x

        return tree_map(renew, forward(*args, **kwargs))

    return wrapped


def _open_exported(module: nn.Module) -> None:
    """An exported program's module checks the sizes it was exported with: the twin does not."""
    guards = module._modules.get("_guards_fn")
    if guards is None:
        return
    guards.__dict__["forward"] = lambda *args, **kwargs: None
    for key, hook in list(module._forward_pre_hooks.items()):
        if "check_input" in getattr(hook, "__name__", ""):
            del module._forward_pre_hooks[key]
