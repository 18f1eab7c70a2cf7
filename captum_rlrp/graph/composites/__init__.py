"""What composite operations are made of, in operations that have rules; one table of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..tracing import Arguments
from .cells import (
    gates,
    gru_cell,
    lstm_cell,
    weights,
)
from .indices import (
    index_add,
    index_fill,
    index_reduce,
    quantile,
    scatter,
    scatter_add,
    scatter_reduce,
)
from .products import (
    bilinear,
    interpolated,
    outer,
    plus_product,
    plus_quotient,
    product,
    repeated,
    running_product,
    solved,
    solved_triangular,
    unpacked,
)
from .statistics import (
    broadcast,
    cosine,
    distances,
    log_sum_exp,
    mean,
    norm,
    pair_distance,
    running_log_sum_exp,
    variance,
)

aten = torch.ops.aten

WRITTEN_OUT: dict[Any, Callable[[Arguments], Any]] = {
    aten.lstm_cell: lstm_cell,
    aten.gru_cell: gru_cell,
    aten.rnn_tanh_cell: lambda a: gates(a["input"], a["hx"], *weights(a)).tanh(),
    aten.rnn_relu_cell: lambda a: gates(a["input"], a["hx"], *weights(a)).relu(),
    aten.var: variance,
    aten.std: lambda a: variance(a).sqrt(),
    aten.var_mean: lambda a: (variance(a), mean(a)),
    aten.std_mean: lambda a: (variance(a).sqrt(), mean(a)),
    aten.norm: norm,
    aten.linalg_vector_norm: norm,
    aten.logsumexp: log_sum_exp,
    aten.logcumsumexp: running_log_sum_exp,
    aten.cosine_similarity: cosine,
    aten.cdist: distances,
    aten._cdist_forward: distances,
    aten.pairwise_distance: pair_distance,
    aten.prod: product,
    aten.cumprod: running_product,
    aten.lerp: interpolated,
    aten.addcmul: plus_product,
    aten.addcdiv: plus_quotient,
    aten.bilinear: bilinear,
    aten.repeat_interleave: repeated,
    aten.outer: outer,
    aten.ger: outer,
    aten.scatter_add: scatter_add,
    aten.index_add: index_add,
    aten.scatter_reduce: scatter_reduce,
    aten.scatter: scatter,
    aten.index_reduce: index_reduce,
    aten.index_fill: index_fill,
    aten.quantile: quantile,
    aten.xlogy: lambda a: a["self"] * a["other"].log(),
    aten.special_xlogy: lambda a: a["self"] * a["other"].log(),
    aten._weight_int8pack_mm: lambda a: (
        a["self"] @ (a["mat2"].to(a["self"].dtype) * a["scales"][:, None]).t()
    ),
    aten._weight_int4pack_mm: unpacked,
    aten._weight_int4pack_mm_for_cpu: unpacked,
    aten.logaddexp: lambda a: log_sum_exp(
        {"self": torch.stack(broadcast(a["self"], a["other"]), -1), "dim": -1}
    ),
    aten.linalg_solve: solved,
    aten.linalg_solve_triangular: solved_triangular,
    aten.hypot: lambda a: (a["self"].square() + a["other"].square()).sqrt(),
}
