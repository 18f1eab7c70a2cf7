"""How many samples of a large batch go through at a time on a CPU, where the user says nothing.

There the C library takes memory for large tensors from the system anew each time, which costs as
much as the arithmetic on it; smaller ones stay in the cache. A batch is divided only where surely
no sample sees another, nor how many there are: by the shapes, and by a list of ops.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping

from torch import SymInt, Tensor
from torch.fx import Node

from ..graph.capture import CapturedGraph, bind
from ..graph.layout import Layout, expression

LARGE = 2**25  # bytes: more than that, glibc takes from the system anew each time
_FEWEST = 4  # samples that are worth the calls


def _ops(names: str) -> frozenset[str]:
    return frozenset(names.split())


# These treat every index of the batch's axis alike, whichever axis it is.
_ALIKE = _ops(
    "linear matmul bmm layer_norm rms_norm relu relu6 leaky_relu elu celu selu gelu silu mish "
    "sigmoid tanh hardswish hardsigmoid hardtanh softplus prelu clamp clamp_min clamp_max exp log "
    "sqrt rsqrt pow abs neg add sub rsub mul div mean sum amax amin cat stack reshape flatten "
    "unflatten squeeze unsqueeze permute transpose expand select slice clone contiguous to "
    "_to_copy alias detach dropout feature_dropout embedding"
)
# These as long as they run along other axes.
_ALONG = _ops("softmax log_softmax roll flip")
# These if it is the first.
_WINDOWS = _ops("conv conv_transpose max_pool avg_pool adaptive_max_pool adaptive_avg_pool")
_FIRST = _ops(
    "batch_norm group_norm scaled_dot_product_attention pad constant_pad_nd pixel_shuffle "
    "pixel_unshuffle upsample_nearest2d upsample_bilinear2d"
).union(f"{name}{axes}d" for name in _WINDOWS for axes in (1, 2, 3))


def find_portion(graph: CapturedGraph, layouts: Mapping[Node, Layout]) -> int | None:
    """The most samples that are to go through at a time.

    Args:
        graph: The captured model.
        layouts: Where the batch lies in the values that depend on the explained inputs.

    Returns:
        The number, or None where all must go through at once.
    """
    if graph.batch is None or graph.guards:
        return None
    values = [0]  # bytes of each for one sample
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        value = node.meta.get("val")
        if isinstance(value, SymInt):
            if not all(map(_reads_as_shape, node.users)):
                return None
        elif isinstance(value, Tensor):
            sizes = [expression(size) for size in value.shape]
            if node.meta["depends"]:
                apart = node in layouts and _keeps_apart(node, layouts)
            else:  # a constant, or one that is repeated for every sample
                apart = all(size.is_Integer for size in sizes) or _name(node) == "expand"
            if not apart:
                return None
            elements = math.prod(int(size.subs(graph.batch, 1)) for size in sizes)
            values.append(elements * value.dtype.itemsize)
        else:
            return None
    weights = sum(node.meta["val"].nbytes for node in graph.parameters)
    # Every portion reads the weights anew: no more bytes than those of its values.
    return max(_FEWEST, LARGE // max(1, *values), weights // max(1, sum(values)))


def divide(batch: int, portion: int) -> int:
    """The size of the portions, as equal as can be."""
    return math.ceil(batch / math.ceil(batch / portion))


def _name(node: Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    is_aten = getattr(node.target, "namespace", None) == "aten"
    return packet.__name__ if packet is not None and is_aten else ""


def _reads_as_shape(user: Node) -> bool:
    """Whether a size is used for a shape, not as a number."""
    return _name(user) in ("reshape", "expand") or user.target in (operator.mul, operator.floordiv)


def _keeps_apart(node: Node, layouts: Mapping[Node, Layout]) -> bool:
    """Whether every sample of a call's result is made of the same sample of its operands."""
    name, dim = _name(node), layouts[node].dim
    sources = [
        n
        for n in node.all_input_nodes
        if n.meta["depends"] and (n.op == "call_function" or n in layouts)  # but integer inputs
    ]
    if any(n not in layouts or layouts[n].inner != layouts[sources[0]].inner for n in sources):
        return False
    if name in _ALONG:
        arguments, axes = bind(node), len(node.meta["val"].shape)
        along = arguments.get("dims", arguments.get("dim"))
        along = along if isinstance(along, (list, tuple)) else [along]
        return bool(along) and all(d % axes != dim for d in along)
    return name in _ALIKE or (name in _FIRST and dim == 0)
