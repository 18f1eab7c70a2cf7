"""One table from op to rule. ``docs/adding-a-rule.md`` tells how to extend it."""

from __future__ import annotations

from typing import Any

import torch

from ..graph.recurrent import RECURRENT
from .attention import ScaledDotProductAttention
from .base import Call, Rule, Slot
from .choice import Chosen, Clamp, Extremum, Maximum, Picked, Where
from .convolution import Convolution, Deformable
from .dense import Dense, Linear, WithShift
from .join import Join, Overwrite, Scatter
from .linear import LinearRule
from .normalization import BatchNorm
from .pass_ import Like, Part, Pass
from .passthrough import InstanceNorm, PassThrough, Power
from .pooling import AdaptiveAvgPool, AvgPool, MaxPool, Reduction, Trapezoid
from .product import Angle, GatedLinearUnit, Product, Scale
from .recurrent import Recurrent
from .shape import (
    Copy,
    Difference,
    Dropout,
    GridSample,
    Interpolate,
    Move,
    Overlapping,
    Pad,
    Reshape,
    Slice,
)
from .skip import Sum

__all__ = [
    "Call",
    "Like",
    "LinearRule",
    "Part",
    "Pass",
    "Rule",
    "Slot",
    "find_rule",
    "has_rule",
    "moves",
    "register_rule",
    "reshapes",
]

_TABLE: dict[str, Rule] = {}


def _add(rule: Rule, names: str) -> None:
    _TABLE.update(dict.fromkeys(names.split(), rule))


# §2 dense maps
_add(Linear(), "linear")
_add(Dense(), "matmul mm bmm mv dot einsum")
_add(WithShift(), "addmm baddbmm addmv")
_add(ScaledDotProductAttention(), "scaled_dot_product_attention")

# §2 spatial maps
_add(
    Convolution(),
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution",
)
for _n in (1, 2, 3):
    _add(AvgPool(_n), f"avg_pool{_n}d")
    _add(AdaptiveAvgPool(_n), f"adaptive_avg_pool{_n}d _adaptive_avg_pool{_n}d")
    _add(MaxPool(_n), f"max_pool{_n}d max_pool{_n}d_with_indices")
    _add(MaxPool(_n, adaptive=True), f"adaptive_max_pool{_n}d")
    _add(Picked(_n), f"fractional_max_pool{_n}d")
_add(Reduction(), "mean sum")
_add(Trapezoid(), "trapezoid")
_add(Difference(), "diff")
_add(Overlapping(), "cumsum col2im fold")
_add(Overlapping("src"), "scatter_add")
_add(GridSample("input"), "grid_sampler grid_sampler_2d grid_sampler_3d")
_add(
    Interpolate(),
    "upsample_linear1d upsample_bilinear2d upsample_trilinear3d _upsample_bilinear2d_aa",
)
_add(Interpolate(cubic=True), "upsample_bicubic2d _upsample_bicubic2d_aa")

_add(Deformable(), "torchvision.deform_conv2d")
_add(Overlapping("input"), "torchvision.roi_align")

# §2, §6 one input for each output: relevance follows the elements
_add(
    BatchNorm(),
    "batch_norm _native_batch_norm_legit_no_training native_batch_norm cudnn_batch_norm",
)
_add(
    Interpolate(nearest=True),
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d",
)
_add(
    Reshape(),
    "view reshape flatten unflatten squeeze unsqueeze _unsafe_view view_as "
    "reshape_as atleast_1d atleast_2d atleast_3d",
)
_add(Slice(), "slice select")
_add(
    Move(),
    "permute transpose t movedim moveaxis swapaxes swapdims numpy_T adjoint mT "
    "narrow index_select index gather take take_along_dim expand expand_as "
    "broadcast_to repeat tile repeat_interleave flip fliplr flipud rot90 roll unfold pixel_shuffle "
    "pixel_unshuffle channel_shuffle native_channel_shuffle diagonal as_strided "
    "permute_copy transpose_copy slice_copy select_copy expand_copy t_copy tril triu "
    "im2col max_unpool2d max_unpool3d",
)
_add(
    Copy(),
    "clone contiguous to _to_copy alias detach lift_fresh lift_fresh_copy type_as "
    "alias_copy view_copy positive real resolve_conj resolve_neg _to_dense "
    "feature_dropout_identity",
)
_add(Dropout(), "dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout")
_add(
    Pad(),
    "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d "
    "replication_pad1d replication_pad2d replication_pad3d",
)

# §3 pass-through
_add(
    PassThrough("self"),
    "relu relu6 leaky_relu elu celu selu gelu silu mish sigmoid tanh hardswish hardsigmoid "
    "hardtanh softplus softshrink hardshrink tanhshrink threshold rrelu log_sigmoid prelu "
    "_prelu_kernel softmax log_softmax _softmax _log_softmax "
    "_safe_softmax exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square abs sin cos tan "
    "asin acos atan sinh cosh asinh acosh atanh erf erfc reciprocal sign floor ceil round trunc "
    "frac logit softmin softsign nan_to_num sinc remainder fmod erfinv lgamma "
    "special_entr special_erfcx special_ndtr special_log_ndtr",
)
_add(
    PassThrough("input"),
    "layer_norm native_layer_norm group_norm native_group_norm rms_norm _fused_rms_norm "
    "captum_rlrp.local_response_norm",
)
_add(InstanceNorm(), "instance_norm")
_add(Power(), "pow float_power")

# §4 sums, §6 products
_add(Sum(), "add sub subtract rsub")
_add(Product(), "mul multiply div divide true_divide")
_add(Angle(), "atan2 arctan2")
_add(Scale(), "neg negative")
_add(GatedLinearUnit(), "glu")

# §5 choices
_add(Clamp(), "clamp clamp_min clamp_max")
_add(Extremum(largest=True), "amax max")
_add(Extremum(largest=False), "amin min")
_add(Chosen(), "topk sort kthvalue median nanmedian mode cummax cummin")
_add(Maximum(1), "maximum fmax")
_add(Maximum(-1), "minimum fmin")
_add(Where(), "where masked_fill")

# §6 the rest
_add(Join(stacks=False), "cat concat concatenate")
_add(Join(stacks=True), "stack")
_add(
    Scatter(),
    "slice_scatter select_scatter diagonal_scatter index_put index_copy masked_scatter fill zero",
)
_add(Overwrite(), "copy")

_CUSTOM: dict[Any, Rule] = {RECURRENT: Recurrent()}


def register_rule(op: Any, rule: Rule) -> None:
    """Gives an op of one's own a rule; see ``docs/adding-a-rule.md``.

    Args:
        op: An operator as the captured graph calls it: ``torch.ops.mylib.myop`` (every overload),
            one overload of it, or what ``torch.library.custom_op`` returned.
        rule: The rule; a later registration replaces an earlier one.

    Raises:
        TypeError: If `op` is no registered operator or `rule` is no :class:`Rule`.
    """
    op = getattr(op, "_opoverload", op)
    if not isinstance(op, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        raise TypeError(
            "register_rule needs an operator such as torch.ops.mylib.myop, not "
            f"{type(op).__name__}."
        )
    if not isinstance(rule, Rule):
        raise TypeError(f"register_rule needs an instance of Rule, not {rule!r}.")
    _CUSTOM[op] = rule


def has_rule(target: Any) -> bool:
    """Whether there is a rule for calls of an op, though perhaps not for every one."""
    return _name(target) in _TABLE or target in _CUSTOM or _packet(target) in _CUSTOM


def find_rule(call: Call) -> Rule | None:
    """The rule for a call, or None."""
    rule = _CUSTOM.get(call.target) or _CUSTOM.get(_packet(call.target))
    rule = rule or _TABLE.get(_name(call.target))
    return rule.select(call) if rule is not None else None


def _packet(target: Any) -> Any:
    return getattr(target, "overloadpacket", None)


def _name(target: Any) -> str:
    """The op's name in the table: without its overload, and with the namespace if not ``aten``."""
    packet = _packet(target)
    if packet is None:
        return ""
    name: str = packet.__name__
    return name if target.namespace == "aten" else f"{target.namespace}.{name}"


def reshapes(target: Any) -> bool:
    """Whether the op keeps the order of the elements (``view`` and its kin)."""
    packet = getattr(target, "overloadpacket", None)
    return packet is not None and isinstance(_TABLE.get(packet.__name__), Reshape)


def moves(target: Any) -> bool:
    """Whether the op's results are elements of its operands, or constants."""
    return isinstance(_TABLE.get(_name(target)), _MOVES)


_MOVES = (Move, Pad, Join, Scatter, Overwrite, Where, Chosen, Extremum)
