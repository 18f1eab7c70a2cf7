"""What a capture took from a model's modules, apart from the values of their parameters."""

from __future__ import annotations

import contextlib
import itertools
import types
import weakref
from collections.abc import Hashable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_PLAIN = (bool, int, float, str, type(None))
_CALLABLE = (types.FunctionType, types.MethodType, partial)
_LONGEST = 16
_REGISTRIES = {name for name in vars(nn.Module()) if name.startswith("_")}
# Bookkeeping of torch's own that no forward reads.
_IGNORED = ("_is_full_backward_hook", "call_super_init", "dump_patches")


class Fingerprint:
    """Modules as they were at a capture.

    Args:
        model: The model.
        after: The twin of the model, after its forward ran. Settings that forward itself changed
            (counters) are none.
    """

    def __init__(self, model: nn.Module, after: nn.Module) -> None:
        twins = dict(after.named_modules())
        self._held = [
            (weakref.ref(module), name, [(weakref.ref(x), _memory_of(x)) for x in held])
            for path, module in model.named_modules()
            for name, held in _held_by(module, twins.get(path))
        ]
        unregistered = {m: "" for _, _, held in self._held for m in _modules(held)}
        self._modules = [
            (
                weakref.ref(module),  # another may have the id of one that is gone
                type(module),
                type(module).forward,
                _structure(module),
                _settings(module, twins.get(name)).items(),
            )
            for module, name in itertools.chain(
                ((m, name) for name, m in model.named_modules()), unregistered.items()
            )
        ]
        self._hooks = _global_hooks()
        self._ties = _ties(model)

    def fits(self, model: nn.Module) -> bool:
        """Whether nothing has changed since."""
        for reference, kind, forward, structure, settings in self._modules:
            module = reference()
            if (
                module is None
                or type(module) is not kind
                or kind.forward is not forward
                or _structure(module) != structure
                or not settings <= module.__dict__.items()
            ):
                return False
        for owner, name, held in self._held:
            now = list(_held(vars(owner()).get(name)))
            if len(now) != len(held) or any(
                then() is not value or memory != _memory_of(value)
                for (then, memory), value in zip(held, now, strict=True)
            ):
                return False
        return self._hooks == _global_hooks() and (not self._ties or self._ties == _ties(model))


def _held_by(module: nn.Module, after: nn.Module | None) -> Iterator[tuple[str, list[Any]]]:
    """The attributes that hold modules or tensors, and what they hold.

    Those in which forward itself keeps tensors (a cache, the last attention map) are none.
    """
    changed = vars(after) if after is not None else {}
    for name, value in vars(module).items():
        found = [] if name in _REGISTRIES else list(_found(value))
        then = list(_found(changed.get(name, value)))
        if found and len(found) == len(then) and all(map(_is_same, found, then)):
            yield name, list(_held(value))


def _is_same(value: Any, after: Any) -> bool:
    return value is after or not isinstance(value, Tensor)


def _memory_of(value: Any) -> Hashable:
    """Where a tensor lies: ``data`` may be assigned. A capture sees what changes in place."""
    strided = isinstance(value, Tensor) and value.layout is torch.strided
    return (value.data_ptr(), value.dtype) if strided else None


def _held(value: Any) -> Iterator[Any]:
    """The modules and tensors that an attribute leads to, parameters and buffers among them."""
    for item in _found(value):
        modules = item.modules() if isinstance(item, nn.Module) else ()
        yield item
        for module in modules:
            yield module
            own = (*module._parameters.values(), *module._buffers.values())
            yield from (tensor for tensor in own if tensor is not None)


def _found(value: Any, depth: int = 3) -> Iterator[Any]:
    """Modules and tensors in lists, dicts and functions, where nothing registers them."""
    if isinstance(value, (Tensor, nn.Module)):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)) and len(value) <= _LONGEST:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _found(item, depth - 1)
    elif depth and isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # still empty
                yield from _found(cell.cell_contents, depth - 1)
        for name in value.__code__.co_names:
            yield from _found(value.__globals__.get(name), depth - 1)


def _modules(held: list[tuple[weakref.ref[Any], Hashable]]) -> Iterator[nn.Module]:
    return (m for reference, _ in held if isinstance(m := reference(), nn.Module))


def _settings(module: nn.Module, after: nn.Module | None) -> dict[str, Any]:
    """The plain attributes that forward may read."""
    changed = vars(after) if after is not None else {}
    known = type(module).__module__.startswith("torch.nn.")
    settings: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name in _IGNORED or (name.startswith("_") and known):
            continue
        if isinstance(value, _CALLABLE):
            settings[name] = value
        elif _is_setting(value) and (name not in changed or changed[name] == value):
            settings[name] = value.copy() if isinstance(value, (list, dict, set)) else value
    return settings


def _structure(module: nn.Module) -> Hashable:
    """Which children, parameters and hooks a module has. The ids of hooks never come again."""
    has = module.__dict__
    return (
        module.training,
        "forward" in has,
        *map(id, has["_modules"].values()),
        *has["_parameters"],
        *map(type, has["_parameters"].values()),  # some are None
        *has["_buffers"],
        *map(type, has["_buffers"].values()),
        *has["_forward_hooks"],
        *has["_forward_pre_hooks"],
    )


def _is_setting(value: Any) -> bool:
    if isinstance(value, (list, tuple, set)):
        return len(value) <= _LONGEST and all(type(item) in _PLAIN for item in value)
    if isinstance(value, dict):
        return len(value) <= _LONGEST and all(type(item) in _PLAIN for item in value.values())
    return type(value) in _PLAIN


def _global_hooks() -> Hashable:
    return (
        *torch_module._global_forward_hooks,
        *torch_module._global_forward_pre_hooks,
    )


def _ties(model: nn.Module) -> list[list[str]]:
    """Names that stand for one parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tied for tied in names.values() if len(tied) > 1]
