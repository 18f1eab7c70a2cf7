"""Calls that draw random numbers."""

from __future__ import annotations

import torch
from torch.fx import Node

from ..errors import CaptureError
from .captured import CapturedGraph
from .nodes import bind, place_of

aten = torch.ops.aten


def check_deterministic(graph: CapturedGraph) -> None:
    """Refuses a graph whose calls draw random numbers.

    Raises:
        CaptureError: Naming each of them.
    """
    found = [node for node in graph.nodes if is_random(node)]
    if found:
        places = "\n".join(f"  {node.target} in {place_of(node)}" for node in found[:8])
        raise CaptureError(
            "The model's forward draws random numbers, so every explanation would be another:\n"
            f"{places}\nPut the module there into eval mode, take the randomness out of forward, "
            "or pass allow_random=True to count the numbers as constants."
        )


def is_random(node: Node) -> bool:
    """Whether the call's result depends on a random generator."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    packet = target.overloadpacket
    args = bind(node)
    trains = args.get("train", args.get("training"))
    if packet in (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu):
        layers = args["num_layers"]
        return bool(trains and args["dropout"] and layers > 1)
    if packet is aten.scaled_dot_product_attention:
        return bool(args["dropout_p"])
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    if "p" in args and trains is not None:
        return bool(trains and args["p"])
    return trains is not False
