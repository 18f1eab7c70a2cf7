"""Relative Layer-Wise Relevance Propagation for PyTorch, as a Captum attribution method."""

from importlib.metadata import PackageNotFoundError, version

from .attribution import LayerRelativeLRP, RelativeLRP
from .dataset.report import build_report
from .dataset.runner import explain_dataset
from .dataset.show import show
from .dataset.statistics import Comparison, RelevanceStatistics
from .errors import (
    CaptureError,
    InputError,
    NonFiniteError,
    RelativeLRPError,
    TrainingModeError,
    UnsupportedOperationError,
)
from .kernels import show_config
from .rules import register_rule

try:
    __version__ = version("captum-rlrp")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0"

__all__ = [
    "CaptureError",
    "Comparison",
    "InputError",
    "LayerRelativeLRP",
    "NonFiniteError",
    "RelativeLRP",
    "RelativeLRPError",
    "RelevanceStatistics",
    "TrainingModeError",
    "UnsupportedOperationError",
    "build_report",
    "explain_dataset",
    "register_rule",
    "show",
    "show_config",
]
