"""A network as zennit wants it: batch norms merged into convolutions, sums of two tensors a module.

Without this, rules by module see neither: relevance would pass a skip connection twice.
"""

from __future__ import annotations

import operator
from copy import deepcopy

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


class Add(nn.Module):
    """a + b by zennit's `Sum`, which its composites have a rule for."""

    def __init__(self) -> None:
        from zennit.layer import Sum

        super().__init__()
        self.sum = Sum()

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.sum(torch.stack([a, b], dim=-1))


class Tracer(fx.Tracer):
    """Convolutions with padding of their own stay whole."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Conv2d) or super().is_leaf_module(module, name)


def visible(network: nn.Module) -> fx.GraphModule:
    """The same function, traced; the network is left alone."""
    network = deepcopy(network)
    copy = fx.GraphModule(network, Tracer().trace(network))
    modules = dict(copy.named_modules())
    for index, node in enumerate(list(copy.graph.nodes)):
        if node.op == "call_function" and node.target in (operator.add, torch.add):
            name = f"add_{index}"
            copy.add_submodule(name, Add())
            with copy.graph.inserting_after(node):
                new = copy.graph.call_module(name, node.args)
            node.replace_all_uses_with(new)
            new.args = node.args
            copy.graph.erase_node(node)
        elif node.op == "call_module" and isinstance(modules[node.target], nn.BatchNorm2d):
            merge(modules[node.args[0].target], modules[node.target])
            node.replace_all_uses_with(node.args[0])
            copy.graph.erase_node(node)
    copy.delete_all_unused_submodules()
    copy.recompile()
    return copy.eval()


def merge(conv: nn.Module, norm: nn.Module) -> None:
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
