"""Operations written out in others: each explained as the same network in plain operations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_rlrp import CaptureError, RelativeLRP
from tests.oracle import Value, explain, relative_error
from tests.paths import all_paths

from .small import agree, explained, of, rows

pytestmark = pytest.mark.usefixtures("one_thread")

X = rows(3, 8)
S = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(2))
INDEX = torch.tensor([0, 2, 2, 1])
WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(4))

# Name → the operation on (batch, 8) and the same in plain operations.
PAIRS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "hstack": (
        lambda x: torch.hstack(x.hsplit(2)[::-1]),
        lambda x: torch.cat([x[:, 4:], x[:, :4]], 1),
    ),
    "column_stack": (lambda x: torch.column_stack([x, x]), lambda x: torch.cat([x, x], 1)),
    "kron": (
        lambda x: torch.kron(x, torch.tensor([[1.0, 2.0]])),
        lambda x: torch.stack([x, x * 2], -1).flatten(1),
    ),
    "nanmean": (lambda x: x.nanmean(1, keepdim=True), lambda x: x.mean(1, keepdim=True)),
    "aminmax": (
        lambda x: torch.cat(torch.aminmax(x, dim=1, keepdim=True), 1),
        lambda x: torch.cat([x.amin(1, keepdim=True), x.amax(1, keepdim=True)], 1),
    ),
    "tensordot": (
        lambda x: torch.tensordot(x, WEIGHT, ([1], [0])),
        lambda x: x @ WEIGHT,
    ),
    "index_reduce": (
        lambda x: x.new_zeros(len(x), 3).index_reduce(
            1, INDEX, x[:, :4], "mean", include_self=False
        ),
        lambda x: torch.stack([x[:, 0], x[:, 3], x[:, 1:3].mean(1)], 1),
    ),
    "scatter": (
        lambda x: x.scatter(1, torch.tensor([[5, 1]]).expand(len(x), 2), x[:, :2].neg()),
        lambda x: torch.cat([x[:, :1], -x[:, 1:2], x[:, 2:5], -x[:, :1], x[:, 6:]], 1),
    ),
    "scatter a number": (
        lambda x: x.scatter(1, torch.tensor([[5, 1]]).expand(len(x), 2), 2.0),
        lambda x: x.masked_fill(torch.tensor([0, 1, 0, 0, 0, 1, 0, 0]).bool(), 2.0),
    ),
    "index_fill": (
        lambda x: x.index_fill(1, torch.tensor([1, 5]), 2.0),
        lambda x: x.masked_fill(torch.tensor([0, 1, 0, 0, 0, 1, 0, 0]).bool(), 2.0),
    ),
    "median by quantile": (
        lambda x: x[:, :5].quantile(0.5, 1, keepdim=True),
        lambda x: x[:, :5].median(1, keepdim=True).values,
    ),
    "two quantiles": (
        lambda x: x[:, :5].quantile(torch.tensor([0.0, 1.0]), 1).t(),
        lambda x: torch.cat([x[:, :5].amin(1, keepdim=True), x[:, :5].amax(1, keepdim=True)], 1),
    ),
    "between two neighbours": (
        lambda x: x[:, :2].quantile(0.25, 1, keepdim=True),
        lambda x: x[:, :2].amin(1, keepdim=True) * 0.75 + x[:, :2].amax(1, keepdim=True) * 0.25,
    ),
    "xlogy": (lambda x: torch.xlogy(x, x.exp() + 1), lambda x: x * (x.exp() + 1).log()),
    "cross": (
        lambda x: torch.linalg.cross(x[:, :3], x[:, 3:6], dim=1),
        lambda x: (
            x[:, [1, 2, 0]] * x[:, 3:6][:, [2, 0, 1]] - x[:, [2, 0, 1]] * x[:, 3:6][:, [1, 2, 0]]
        ),
    ),
    "atan2": (
        lambda x: torch.atan2(x[:, :4], x[:, 4:].exp()),
        lambda x: (x[:, :4] / x[:, 4:].exp()).atan(),
    ),
    "angle": (
        lambda x: torch.complex(x[:, 4:].exp(), x[:, :4]).angle(),
        lambda x: (x[:, :4] / x[:, 4:].exp()).atan(),
    ),
    "logcumsumexp": (
        lambda x: torch.logcumsumexp(x[:, :3], 1),
        lambda x: torch.cat([x[:, :n].logsumexp(1, keepdim=True) for n in (1, 2, 3)], 1),
    ),
    "vmap": (
        lambda x: torch.vmap(lambda row: (row @ WEIGHT).tanh())(x),
        lambda x: (x @ WEIGHT).tanh(),
    ),
    "int8 weights": (
        lambda x: torch._weight_int8pack_mm(
            x, (WEIGHT * 30).to(torch.int8), torch.full((8,), 1 / 30)
        ),
        lambda x: x @ ((WEIGHT * 30).to(torch.int8).float() / 30).t(),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_same_as_in_plain_operations(name: str) -> None:
    torch.manual_seed(0)
    first = nn.Linear(8, 8)
    size = PAIRS[name][1](X).shape[1]
    head = nn.Linear(size, 3)

    def network(operation: Callable[[Tensor], Tensor]) -> nn.Module:
        return of(lambda s, x: s.h(operation(s.a(x).tanh()).tanh()), a=first, h=head)

    written, plain = (network(operation) for operation in PAIRS[name])
    (found,) = all_paths(written, X, [0, 1, 2], tolerance=1e-3)
    agree(found, explained(plain, X, [0, 1, 2]), 1e-3)


# ---- complex numbers -----------------------------------------------------------------------------


def complex_of(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.contiguous())


# Each a chain of linear maps of positions, told to the oracle as such.
TRANSFORMS: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "rfft": [lambda x: torch.view_as_real(torch.fft.rfft(x))],
    "fft, padded": [lambda x: torch.view_as_real(torch.fft.fft(x, n=11, norm="ortho"))],
    "real part": [lambda x: torch.fft.rfft(x, dim=1).real],
    "ihfft": [lambda x: torch.view_as_real(torch.fft.ihfft(x).resolve_conj())],
    "shifted": [lambda x: torch.view_as_real(torch.fft.fftshift(torch.fft.fft(x), dim=-1))],
    "irfft": [lambda x: torch.fft.irfft(complex_of(x.unflatten(-1, (4, 2))))],
    "irfft, odd": [lambda x: torch.fft.irfft(complex_of(x.unflatten(-1, (4, 2))), n=7)],
    "ifft": [lambda x: torch.view_as_real(torch.fft.ifft(complex_of(x.unflatten(-1, (4, 2)))))],
    "stft": [
        lambda x: (
            torch.stft(
                x.flatten(1),
                16,
                5,
                12,
                torch.hann_window(12).to(x),
                center=False,
                return_complex=True,
            ).real
        )
    ],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_is_a_linear_map_of_positions(name: str) -> None:
    maps = TRANSFORMS[name]
    torch.manual_seed(0)
    first = nn.Linear(8, 8).double().eval()
    x = S.double()
    value = x
    for step in maps:
        value = step(value)
    head = nn.Linear(value.flatten(1).shape[1], 3).double().eval()

    def forward(s: Any, v: Tensor) -> Tensor:
        v = s.a(v).tanh()
        for step in maps:
            v = step(v)
        return s.h(v.flatten(1).tanh())

    def twin(v: Value) -> Value:
        v = v.dense(first).act(torch.tanh)
        for step in maps:
            v = v.spatial(step)
        return v.move(lambda t: t.flatten(1)).act(torch.tanh).dense(head)

    (found,) = all_paths(of(forward, a=first, h=head), x, [0, 2])
    (expected,) = explain(twin, (x,), targets=[0, 2])
    assert relative_error(found, expected) <= 1e-9


@pytest.mark.parametrize("length", [None, 11, 14])
@pytest.mark.parametrize("one_sided", [True, False])
def test_a_short_time_transform_back(length: int | None, one_sided: bool) -> None:
    """Frames transformed back, each under the window, and what overlaps is added."""
    window, count, hop, size = torch.hann_window(6).double() + 0.3, 5, 3, 8
    bins = 5 if one_sided else 8
    window8 = nn.functional.pad(window, (1, 1))

    def spectrum(x: Tensor) -> Tensor:
        return complex_of(x.unflatten(1, (bins, count, 2)))

    def transform(x: Tensor) -> Tensor:
        return torch.fft.irfft(spectrum(x)[:, :5], n=size, dim=1)

    def overlap(frames: Tensor) -> Tensor:
        frames = frames * window8[:, None]
        whole = (1, size + hop * (count - 1))
        y = nn.functional.fold(frames, whole, (1, size), stride=(1, hop))
        weight = window8.square()[None, :, None].expand(1, -1, count)
        weight = nn.functional.fold(weight, whole, (1, size), stride=(1, hop))
        y = y.flatten(1) / weight.flatten(1).clamp_min(1e-9)
        return y[:, size // 2 :][:, : length or 12]

    torch.manual_seed(0)
    first = nn.Linear(8, bins * count * 2).double().eval()
    head = nn.Linear(length or 12, 3).double().eval()

    def forward(s: Any, x: Tensor) -> Tensor:
        how: Any = {"win_length": 6, "window": window, "length": length, "onesided": one_sided}
        y = torch.istft(spectrum(s.a(x).tanh()), size, hop, **how)
        return s.h(y.tanh())

    def twin(v: Value) -> Value:
        v = v.dense(first).act(torch.tanh).spatial(transform).spatial(overlap)
        return v.act(torch.tanh).dense(head)

    x = rows(2, 8).double()
    (found,) = all_paths(of(forward, a=first, h=head), x, [0, 2])
    (expected,) = explain(twin, (x,), targets=[0, 2])
    assert relative_error(found, expected) <= 1e-9


def test_a_spectrogram() -> None:
    """The absolute value is the root of a sum of two squares."""

    def spectrum(s: Any, x: Tensor) -> Tensor:
        window = torch.hann_window(8)
        return s.h(torch.stft(x, 8, 4, window=window, return_complex=True).abs().flatten(1))

    def plain(s: Any, x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x[:, None], (4, 4), "reflect")
        angle = torch.arange(5)[:, None] * torch.arange(8) * (2 * torch.pi / 8)
        waves = torch.stack([angle.cos(), -angle.sin()]) * torch.hann_window(8)
        y = torch.nn.functional.conv1d(x, waves.reshape(10, 1, 8), stride=4).unflatten(1, (2, 5))
        return s.h((y[:, 0].square() + y[:, 1].square()).sqrt().flatten(1))

    torch.manual_seed(0)
    head = nn.Linear(65, 3)
    x = rows(2, 48)
    (found,) = all_paths(of(spectrum, h=head), x, 1, tolerance=1e-3)
    agree(found, explained(of(plain, h=head), x, 1), 1e-3)


class GlobalFilter(nn.Module):
    """A filter in the frequency domain, with complex weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(8, 8), nn.Linear(48, 3)
        self.weight = nn.Parameter(torch.randn(6, 5, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(self.first(x).tanh(), norm="ortho") * self.weight
        filtered = torch.zeros_like(spectrum)
        filtered[:, :4] = spectrum[:, :4]
        return self.head(torch.fft.irfft2(filtered, s=(6, 8), norm="ortho").flatten(1))


def test_a_filter_in_the_frequency_domain() -> None:
    (found,) = all_paths(GlobalFilter().eval(), S, 1, tolerance=1e-3)
    assert (found.abs().sum((1, 2)) > 0.01).all()


@pytest.mark.parametrize(
    "parts",
    [
        lambda v: v.chunk(2, 1),
        lambda v: v.split(4, 1),
        lambda v: v.split([4, 4], 1),
        lambda v: v.unflatten(1, (2, 4)).unbind(1),
    ],
    ids=["chunk", "split", "sizes", "unbind"],
)
def test_parts_of_an_image(parts: Callable[[Tensor], Any]) -> None:
    """They are slices, wherever an image's channels lie in memory."""

    def forward(s: Any, x: Tensor, parts: Callable[[Tensor], Any] = parts) -> Tensor:
        first, second = parts(s.a(x).relu())
        return s.h(torch.cat([s.b(first).relu(), second], 1).mean((2, 3)))

    torch.manual_seed(0)
    own = {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(4, 4, 3, padding=1), "h": nn.Linear(8, 3)}
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(1))
    (found,) = all_paths(of(forward, **own), x, 1)
    sliced = of(lambda s, x: forward(s, x, lambda v: (v[:, :4], v[:, 4:])), **own)
    agree(found, explained(sliced, x, 1))


# ---- regions -------------------------------------------------------------------------------------


def test_autocast_inside_forward() -> None:
    def cast(s: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = s.a(x).relu()
        return s.o(y.float())

    def plain(s: Any, x: Tensor) -> Tensor:
        weight, bias = s.a.weight.bfloat16(), s.a.bias.bfloat16()
        return s.o(torch.nn.functional.linear(x.bfloat16(), weight, bias).relu().float())

    torch.manual_seed(0)
    own = {"a": nn.Linear(8, 6), "o": nn.Linear(6, 3)}
    agree(explained(of(cast, **own), X), explained(of(plain, **own), X), 1e-3)


@pytest.mark.filterwarnings("ignore")
def test_transformers_with_masks() -> None:
    """A causal mask hides the future: the first target sees itself and the source alone."""
    torch.manual_seed(0)
    transformer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True).eval()
    head = nn.Linear(8, 3)
    mask = nn.Transformer.generate_square_subsequent_mask(4)

    def forward(s: Any, source: Tensor, target: Tensor) -> Tensor:
        return s.h(s.t(source, target, tgt_mask=mask)[:, 0])

    inputs = (S, S[:, :4].flip(0))
    source, target = all_paths(of(forward, t=transformer, h=head), inputs, 1, tolerance=1e-3)
    assert (source.abs().sum((1, 2)) > 0).all()
    assert target[:, 0].any()
    assert not target[:, 1:].any()


def test_a_mask_is_no_matter_of_its_values() -> None:
    """As an argument, causal or not, hinted or not."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    head = nn.Linear(8, 3)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    plain = of(lambda s, x, m: s.h(s.e.layers[0](x, m).mean(1)), e=encoder, h=head)
    whole = of(lambda s, x, m: s.h(s.e(x, m).mean(1)), e=encoder, h=head)
    for one in (mask, mask.flip(0)[:, :].tril(2)):
        expected = explained(plain, S, additional_forward_args=(one,))
        agree(explained(whole, S, additional_forward_args=(one,)), expected)


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
        inside = explained(model, X)
    plain = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    plain.load_state_dict(copy.deepcopy(model.state_dict()))
    expected = explained(plain, X)
    agree(inside, expected)
    agree(explained(model, X), expected)


def test_a_refused_capture_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model = of(lambda s, x: s.o(x) if x.sum() > 0 else s.o(-x), o=nn.Linear(8, 3))
    with pytest.raises(CaptureError):
        RelativeLRP(model).attribute(X[:1], 0)
    assert capfd.readouterr() == ("", "")


def test_packed_four_bit_weights() -> None:
    """What the product makes of unit vectors is the matrix."""
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (64, 32), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(1, 64, 2).bfloat16()

    def product(x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, scales)

    matrix = product(torch.eye(32).bfloat16())
    head = nn.Linear(64, 3).bfloat16()
    x = rows(3, 32).bfloat16()
    found = explained(of(lambda s, v: s.h(product(v).relu()), h=head), x)
    expected = explained(of(lambda s, v: s.h((v @ matrix).relu()), h=head), x)
    agree(found.float(), expected.float(), 0.02)


STABLE = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)) + 3 * torch.eye(6)
SAME: dict[str, tuple[Any, Any]] = {
    "solve": (
        lambda h: torch.linalg.solve(STABLE, h.t()).t(),
        lambda h: h @ torch.linalg.inv(STABLE).t(),
    ),
    "solve for vectors": (
        lambda h: torch.linalg.solve(STABLE.expand(len(h), 6, 6), h),
        lambda h: h @ torch.linalg.inv(STABLE).t(),
    ),
    "solve from the right": (
        lambda h: torch.linalg.solve(STABLE, h, left=False),
        lambda h: h @ torch.linalg.inv(STABLE),
    ),
    "solve a triangle": (
        lambda h: torch.linalg.solve_triangular(
            STABLE, h, upper=False, left=False, unitriangular=True
        ),
        lambda h: h @ torch.linalg.inv(STABLE.tril(-1) + torch.eye(6)),
    ),
    "divide and round": (
        lambda h: torch.div(h, 0.1, rounding_mode="floor"),
        lambda h: (h / 0.1).floor(),
    ),
    "a number to a power": (lambda h: 2**h, torch.exp2),
}


@pytest.mark.parametrize("name", SAME)
def test_another_way_to_write_it(name: str) -> None:
    torch.manual_seed(0)
    own = {"a": nn.Linear(4, 6), "o": nn.Linear(6, 2)}
    one, other = (of(lambda s, x, f=f: s.o(f(s.a(x).relu())), **own) for f in SAME[name])
    x = torch.randn(3, 4)
    (found,) = all_paths(one, x, 1)
    agree(found, explained(other, x, 1))
    assert (found.abs().sum(1) > 0.05).all()
