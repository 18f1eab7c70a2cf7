"""What a capture took from a model's modules, apart from the values of their parameters."""

from __future__ import annotations

import types
import weakref
from collections.abc import Hashable
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

_PLAIN = (bool, int, float, str, type(None))
_CALLABLE = (types.FunctionType, types.MethodType, partial)
_LONGEST = 16
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
        self._modules = [
            (
                weakref.ref(module),  # another may have the id of one that is gone
                type(module),
                type(module).forward,
                _structure(module),
                _settings(module, twins.get(name)).items(),
            )
            for name, module in model.named_modules()
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
        return self._hooks == _global_hooks() and (not self._ties or self._ties == _ties(model))


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
