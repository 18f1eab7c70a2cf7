"""A layer of ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` as one call of the graph.

Export would take it apart into a dozen calls for every step of the sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("captum_rlrp::recurrent_layer", mutates_args=())
def recurrent_layer(
    kind: str,
    input: Tensor,
    hx: list[Tensor],
    params: list[Tensor],
    has_biases: bool,
    cells: bool,
) -> Tensor:
    """One layer, in one direction or both.

    It returns one tensor, as calls that relevance goes through do. Who wants outputs and cells
    makes two calls.

    Args:
        kind: What PyTorch calls it: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        input: Of shape (steps, batch, features).
        hx: The states at the start, (directions, batch, size) each: of an LSTM h and c.
        params: The weights of each direction: W_ih, W_hh, and if there are any b_ih, b_hh, W_hr.
        has_biases: Whether there are b_ih and b_hh.
        cells: Whether to return an LSTM's cell states at the end.

    Returns:
        The outputs (steps, batch, directions · size), or with `cells` c (directions, batch, size).
    """
    state = hx if kind == "lstm" else hx[0]
    both = len(hx[0]) == 2
    layer = getattr(torch, kind)
    output, *ends = layer(input, state, params, has_biases, 1, 0.0, False, both, False)
    result: Tensor = ends[1] if cells else output
    return result.contiguous()


@recurrent_layer.register_fake
def _(
    kind: str,
    input: Tensor,
    hx: list[Tensor],
    params: list[Tensor],
    has_biases: bool,
    cells: bool,
) -> Tensor:
    if cells:
        return torch.empty_like(hx[1])
    directions, _, size = hx[0].shape
    return input.new_empty(*input.shape[:2], directions * size)


RECURRENT = torch.ops.captum_rlrp.recurrent_layer.default
