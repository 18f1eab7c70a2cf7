"""A user's program, checked by mypy --strict in test_typing; it is never run."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from captum_rlrp import (
    InputError,
    LayerRelativeLRP,
    RelativeLRP,
    RelevanceStatistics,
    build_report,
    explain_dataset,
    register_rule,
    show_config,
)
from captum_rlrp.rules import Rule

model: nn.Module = nn.Linear(4, 2).eval()
x = torch.rand(3, 4)

one: Tensor = RelativeLRP(model).attribute(x, target=1)
two: tuple[Tensor, ...] = RelativeLRP(model, backend="reference").attribute((x, x), target=1)
relevance, delta = RelativeLRP(model).attribute(x, target=[0, 1, 1], return_convergence_delta=True)
shape: torch.Size = relevance.shape
rounding: float = delta.max().item()
names: list[str] = LayerRelativeLRP(model).layer_names(x)

data = TensorDataset(x, torch.tensor([0, 1, 1]))
path: Path = explain_dataset(model, data, "run", target=["predicted", 1])
page: Path = build_report("run")
statistics = RelevanceStatistics.collect(model, [(x,)])
mean: Tensor = statistics.mean("input", None)
config: dict[str, object] = show_config()


class Mine(Rule):
    """A rule of one's own."""


register_rule(torch.ops.aten.relu, Mine())
try:
    RelativeLRP(model).attribute(x)
except InputError as error:
    message: str = str(error)
