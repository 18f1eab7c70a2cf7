"""Small denominators: networks whose sums nearly cancel, and ResNets at random initialisation.

All in float64, so that what is seen is the method and not the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from evaluation import measures
from evaluation.data import Data, load
from evaluation.methods import METHODS, OURS, Method, applicable, prepare
from evaluation.networks import build, dense, in_eval
from evaluation.protocol import Protocol

INPUTS = 2  # networks for each cancellation; inputs for each other network

Row = dict[str, Any]
Case = tuple[str, float, nn.Module, Data, Tensor]  # group, place on the x axis, …, inputs


def cancelling_dense(cancellation: float, seed: int) -> tuple[nn.Module, Tensor]:
    """A dense net and an input at which every later pre-activation is `cancellation` of its usual.

    The contributions to each sum stay as large as they were; only their sum is small.
    """
    torch.manual_seed(seed)
    network = dense(20, 5).double()
    x = torch.randn(1, 20, dtype=torch.float64)
    value = x
    with torch.no_grad():
        for index, layer in enumerate(m for m in network if isinstance(m, nn.Linear)):
            layer.bias.zero_()
            if index:
                surplus = (1 - cancellation) * layer(value)
                layer.weight -= surplus.T @ value / value.square().sum()
            value = layer(value).relu()
    return in_eval(network), x


def cancelling_residual(cancellation: float, seed: int) -> tuple[nn.Module, Tensor]:
    """A ResNet18 and an input at which the last block adds nearly the negative of its input.

    What is left of h + F(h) is `cancellation` times h. On pictures of 32 pixels the block's maps
    are single pixels, so that its second convolution can be solved for F(h).
    """
    torch.manual_seed(seed)
    network = in_eval(models.resnet18(num_classes=5)).double()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64).clamp(-2, 2)
    block = network.layer4[1]
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])),
        block.conv2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])),
    ]
    with torch.no_grad():
        network.fc.bias.zero_()
        network(x)
        for hook in hooks:
            hook.remove()
        entering, inner = (value.flatten() for value in seen)
        scale = (1 + block.bn2.eps) ** 0.5  # of a fresh batch norm
        weight = block.conv2.weight[:, :, 1, 1]
        missing = -(1 - cancellation) * entering * scale - weight @ inner
        block.conv2.weight[:, :, 1, 1] += torch.outer(missing, inner) / inner.square().sum()
    return network, x


def cases(protocol: Protocol, folder: Path) -> Iterator[Case]:
    """Every network of this section with its inputs."""
    flat = Data(("",) * 5, (20,), -3.0, 3.0, _no_batch, _no_test)
    picture = Data(("",) * 5, (3, 32, 32), -2.0, 2.0, _no_batch, _no_test)
    torch.manual_seed(0)
    pictures = torch.randn(INPUTS, 3, 32, 32, dtype=torch.float64).clamp(-2, 2)
    for cancellation in protocol.cancellation:
        for seed in range(INPUTS):
            network, x = cancelling_dense(cancellation, seed)
            yield "dense", cancellation, network, flat, x
            network, x = cancelling_residual(cancellation, seed)
            yield "residual", cancellation, network, picture, x
    for arch in protocol.depths:
        torch.manual_seed(0)
        network = in_eval(models.get_model(arch, num_classes=5)).double()
        yield "random init", float(arch.removeprefix("resnet")), network, picture, pictures
    for cell in protocol.cells:
        stored = folder / f"{cell.network}-{cell.data}-{protocol.seeds[0]}.pt"
        if stored.exists():
            data = load(cell.data, cell.size)
            network = build(cell.network, data, protocol.width)
            network.load_state_dict(torch.load(stored, weights_only=True)["state"])
            inputs = data.test(INPUTS).inputs.double()
            yield f"{cell.network}, {cell.data}", 0.0, in_eval(network).double(), data, inputs


def _no_batch(*_: object) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


_no_test: Any = _no_batch


def measure(protocol: Protocol, folder: Path) -> Iterator[Row]:
    """One row for each network and method."""
    for group, place, network, data, x in cases(protocol, folder):
        for name, method in applicable(METHODS, network):
            row: Row = {"group": group, "place": place, "method": name}
            try:
                row |= one(method, network, data, x, protocol)
            except Exception as error:
                if name == OURS:
                    raise
                row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            yield row


def one(method: Method, network: nn.Module, data: Data, x: Tensor, protocol: Protocol) -> Row:
    """Size, jump and non-finite share of one method's maps."""
    with torch.no_grad():
        logit, target = network(x).max(1)
    explain = prepare(method, network, data, protocol)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    maps, after = explain(x, target), explain(x + protocol.nudge * noise.sign(), target)
    change = (after - maps).abs().flatten(1).sum(1) / maps.abs().flatten(1).sum(1)
    return {
        "amplification": _list(measures.amplification(method.law, maps, logit)),
        "change": _list(change),
        "nonfinite": _list((~maps.isfinite()).flatten(1).any(1).double()),
    }


def _list(values: Tensor) -> list[float | None]:
    return [float(f"{v:.6g}") if abs(v) < float("inf") else None for v in values.tolist()]
