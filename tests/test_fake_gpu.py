"""Whole explanations on tensors of a GPU that is not there.

PyTorch's fake tensors have a device, a shape and no memory. They refuse what mixes devices and what
reads a value, for which a real GPU would have to be waited for. What is computed, they cannot tell.
Where the CUDA module is built, the ops are those that a GPU would run, in place too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models

from captum_rlrp import RelativeLRP
from captum_rlrp.graph.twins import twin
from captum_rlrp.kernels import extension
from captum_rlrp.plan.steps import Single
from captum_rlrp.rules import Part, Pass
from captum_rlrp.run import capturing, engine, program, task, wide
from captum_rlrp.run.cuda_graphs import CudaGraphs
from captum_rlrp.run.recording import Recorder, Recordings
from captum_rlrp.run.trace import Traces

from .test_recording import FakeTape


class Signal(nn.Module):
    """Layers of one dimension, a gate, a skip, and a module that makes tensors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(3, 16, 7, 2, 3), nn.BatchNorm1d(16), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU())
        self.gate = nn.Conv1d(16, 16, 1)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool1d(self.first(x), 2)
        x = torch.relu(x + self.branch(x)) * self.gate(x).sigmoid()
        ramp = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)
        return self.last((x * ramp).amax(2))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(x)[:, 0])


CASES: dict[str, tuple[Callable[[], nn.Module], Sequence[int]]] = {
    "ResNet18": (models.resnet18, (3, 64, 64)),
    "VGG11 with batch norm": (models.vgg11_bn, (3, 64, 64)),
    "MobileNetV3": (models.mobilenet_v3_small, (3, 64, 64)),
    "DenseNet": (lambda: models.DenseNet(4, (2, 2), 8), (3, 64, 64)),
    "signal": (Signal, (3, 64)),
    "attention": (Attention, (5, 8)),
}


def move(module: nn.Module) -> None:
    """Puts parameters without memory in the place of the module's own."""
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            fake = nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="cuda"))
            part._parameters[name] = fake
        for name, value in list(part.named_buffers(recurse=False)):
            part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")


class Untried:
    """In the place of the model's own forward, whose values say nothing here."""

    def __init__(self, model: nn.Module, form: Any, args: Any) -> None:
        self.args = args
        self.root = twin(model, form, own_buffers=True)
        self.output = torch.empty(len(args[0]), 1)

    def check(self, _: Tensor) -> None:
        """Nothing to compare."""

    def tells_apart(self, *_: Any) -> bool:
        """Nothing to tell."""
        return True


@pytest.fixture
def without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be done: the look at the totals, and autograd, whose engine asks for the device.

    And what has to be told apart all the same: memory, by which it is decided what may be written
    over. The address of a storage stands for that of its bytes.
    """

    def gradient(y: Tensor, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        return (torch.empty_like(x),)

    def place(x: Tensor) -> int:
        return int(x.untyped_storage()._cdata)

    monkeypatch.setattr(engine, "unsound", lambda *_: [])
    monkeypatch.setattr(capturing, "Trial", Untried)
    monkeypatch.setattr(torch.autograd, "grad", gradient)
    monkeypatch.setattr(FakeTensor, "data_ptr", place, raising=False)
    monkeypatch.setattr(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata)


class Calls(TorchDispatchMode):
    """Notes which of the package's ops are called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "captum_rlrp":
            self.ops.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def ops_of_the_gpu() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    ours = (n for n in names if n.startswith("captum_rlrp::"))
    return {n.partition("::")[2] for n in ours if has_kernel(n, "CUDA")}


@pytest.mark.usefixtures("without_values")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_all_stays_on_the_gpu(name: str, dtype: torch.dtype) -> None:
    make, shape = CASES[name]
    model = make().eval().to(dtype)
    with FakeTensorMode(shape_env=ShapeEnv()):
        move(model)
        rlrp = RelativeLRP(model)
        calls = Calls()
        for batch in (2, 3):
            x = torch.empty(batch, *shape, dtype=dtype, device="cuda")
            with calls:
                attribution, delta = rlrp.attribute(
                    x, target=[1] * batch, return_convergence_delta=True
                )
                assert (attribution.shape, attribution.dtype) == (x.shape, dtype)
                assert attribution.device == delta.device == x.device
                assert attribution.is_contiguous()
                again = rlrp.attribute(x, target=[1] * batch)  # which may write over more
                assert (again.shape, again.dtype, again.device) == (x.shape, dtype, x.device)
    if name == "ResNet18" and extension.cuda_available():
        assert calls.ops >= {op for op in ops_of_the_gpu() if op.endswith("_")}  # in place


class Magnitudes(TorchDispatchMode):
    """Notes how absolute values of weights are worked out."""

    def __init__(self) -> None:
        super().__init__()
        self.together: list[int] = []  # tensors of each multi-tensor call
        self.alone = 0  # calls for one weight each

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._foreach_abs.default:
            self.together.append(len(args[0]))
        elif func is torch.ops.aten.abs.default and isinstance(args[0], nn.Parameter):
            self.alone += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("without_values")
@pytest.mark.parametrize(
    ("dtype", "carried"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),  # which holds what float16 does not
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CASES)
def test_what_relevance_is_carried_in(
    name: str, dtype: torch.dtype, carried: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = CASES[name]
    seen: list[torch.dtype] = []
    propagate = Single.propagate

    def watched(step: Single, run: Pass, r: Tensor) -> Sequence[Tensor | Part]:
        parts = propagate(step, run, r)
        seen.append(r.dtype)
        seen.extend((p.relevance if isinstance(p, Part) else p).dtype for p in parts)
        return parts

    monkeypatch.setattr(Single, "propagate", watched)
    model = make().eval().to(dtype)
    with FakeTensorMode(shape_env=ShapeEnv()):
        move(model)
        rlrp = RelativeLRP(model)
        x = torch.empty(2, *shape, dtype=dtype, device="cuda")
        result = rlrp.attribute(x, target=1)
    assert len(seen) > 10
    assert set(seen) == {carried}
    assert result.dtype == (torch.float32 if dtype == torch.float16 else dtype)


@pytest.mark.usefixtures("without_values")
@pytest.mark.parametrize("name", CASES)
def test_magnitudes_of_all_weights_are_one_call(name: str) -> None:
    make, shape = CASES[name]
    model = make().eval()
    with FakeTensorMode(shape_env=ShapeEnv()):
        move(model)
        rlrp = RelativeLRP(model)
        x = torch.empty(2, *shape, device="cuda")
        rlrp.attribute(x, target=1)
        with Magnitudes() as seen:
            rlrp.attribute(x, target=1)
    assert len(seen.together) == (3 if "VGG" in name else 1)  # one of its layers is large
    assert max(seen.together) > 1
    assert seen.alone == 0


@pytest.mark.parametrize("several", ["targets", "parts"])
def test_one_look_at_the_end(several: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where there is something to see: whatever reads a value comes last."""
    torch.manual_seed(0)
    model = models.resnet18().eval()
    rlrp = RelativeLRP(model)
    rlrp._engine.recordings = {}  # a recording would not come by here
    x = torch.randn(4, 3, 32, 32)
    target: Any = range(3) if several == "targets" else 1
    options = {} if several == "targets" else {"internal_batch_size": 1}
    rlrp.attribute(x, target=target, **options)  # captures
    order: list[str] = []

    def looks(*args: Any) -> list[int]:
        order.append("look")
        return wide.unsound(*args)

    def totals(*args: Any) -> Tensor:
        order.append("pass back")
        return program.totals(*args)

    monkeypatch.setattr(engine, "unsound", looks)
    monkeypatch.setattr(task, "totals", totals)
    rlrp.attribute(x, target=target, **options)
    count = 3 if several == "targets" else 4
    assert order == ["pass back"] * count + ["look"] * count


@pytest.mark.usefixtures("without_values")
@pytest.mark.parametrize("recorder", [CudaGraphs(FakeTape), Traces()], ids=["graph", "trace"])
@pytest.mark.parametrize("name", CASES)
def test_all_can_be_recorded(name: str, recorder: Recorder) -> None:
    make, shape = CASES[name]
    model = make().eval()
    with FakeTensorMode(shape_env=ShapeEnv()):
        move(model)
        rlrp = RelativeLRP(model)
        recordings = rlrp._engine.recordings["cuda"] = Recordings(recorder)
        for _ in range(3):
            x = torch.empty(2, *shape, device="cuda")
            assert rlrp.attribute(x, target=1).device == x.device
        assert len(recordings) == 1


@pytest.mark.usefixtures("without_values")
def test_a_read_is_noticed() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(1, keepdim=True)

    rlrp = RelativeLRP(Reads())
    with FakeTensorMode(shape_env=ShapeEnv()):
        x = torch.empty(2, 3, device="cuda")
        with pytest.raises(Exception, match="data-dependent"):
            rlrp.attribute(x, target=lambda y: [0] * int(y.sum()))
