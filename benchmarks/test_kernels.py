"""Each compiled kernel against the plain ATen composition it replaces.

    pytest benchmarks/test_kernels.py --benchmark-json=out.json

The two sides take turns, A B A B …, so that their ratio means something even on a busy machine.
pytest-benchmark times ours; ATen's median and the median of the ratios of each turn stand in its
``extra_info``. Sizes are those of VGG16 and ResNet50 at 224², a few images at a time.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

import pytest
import torch

from captum_rlrp.kernels import compiled, convolution, extension, reference

pytest.importorskip("pytest_benchmark")
if not extension.available():
    pytest.skip(f"extension not loaded: {extension.load_error()}", allow_module_level=True)

aten = torch.ops.aten
DEVICE = "cuda" if torch.cuda.is_available() and extension.cuda_available() else "cpu"
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
ROUNDS = 15
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

MANY = 16 if DEVICE == "cuda" else 1  # smaller sizes would only show what a launch takes

# (N, C, H, W): after VGG16's second convolution, in ResNet50's second and fourth stage.
ELEMENTWISE = {
    "vgg16.conv1_2": (2 * MANY, 64, 224, 224),
    "resnet50.layer2": (4 * MANY, 512, 28, 28),
    "resnet50.layer4": (8 * MANY, 2048, 7, 7),
}
MAX_POOLS = {
    "vgg16.pool1": ((2 * MANY, 64, 224, 224), (2, 2, 0)),
    "vgg16.pool4": ((4 * MANY, 512, 28, 28), (2, 2, 0)),
    "resnet50.maxpool": ((4 * MANY, 64, 112, 112), (3, 2, 1)),
}
POOLS = (torch.nn.functional.max_pool1d, torch.nn.functional.max_pool2d)
AVERAGE_POOLS = {
    "resnet50.avgpool": ((8 * MANY, 2048, 7, 7), (1, 1)),
    "vgg16.avgpool": ((4 * MANY, 512, 14, 14), (7, 7)),
}
DENSE = {  # rows, inputs, outputs
    "vgg16.fc1": (8, 25088, 4096),
    "vgg16.fc2": (1, 4096, 4096),
    "vit_b_16.mlp": (197, 768, 3072),
}
HEADS = {  # indices in front, rows, inner, columns
    "vit_b_16, q k": (2, 12, 197, 64, 197),
    "vit_b_16, a v": (2, 12, 197, 197, 64),
    "swin_t, q k": (128, 3, 49, 32, 49),
    "swin_t, a v": (128, 3, 49, 49, 32),
}
CONVOLUTIONS = [  # layer, batch, channels, filters, size, taps, stride along their axes
    ("resnet50.layer1.conv2", 8, 64, 64, (56, 56), (3, 3), 1),
    ("resnet50.layer3.conv2", 8, 256, 256, (14, 14), (3, 3), 1),
    ("resnet50.layer3.conv2", 1, 256, 256, (14, 14), (3, 3), 1),
    ("vgg16.conv1_2", 1, 64, 64, (224, 224), (3, 3), 1),
    ("vgg16.conv4_2", 4, 512, 512, (28, 28), (3, 3), 1),
    ("densenet121.block1", 4, 128, 32, (56, 56), (3, 3), 1),
    ("resnet50.layer2.0.conv2", 8, 128, 128, (56, 56), (3, 3), 2),
    ("resnet50.layer3.0.conv2", 8, 256, 256, (28, 28), (3, 3), 2),
    ("alexnet.features.3", 8, 64, 192, (27, 27), (5, 5), 1),
    ("resnet50.layer1.conv3", 8, 64, 256, (56, 56), (1, 1), 1),
    ("resnet50.layer3.conv1", 8, 1024, 256, (14, 14), (1, 1), 1),
    ("resnet50.layer4.conv3", 1, 512, 2048, (7, 7), (1, 1), 1),
    ("densenet121.transition1", 4, 256, 128, (56, 56), (1, 1), 1),
    ("inception_v3.mixed_6b", 4, 128, 128, (17, 17), (1, 7), 1),
    ("cnn_1d.3", 1, 64, 64, (1, 1024), (1, 7), 1),
    ("cnn_1d.6", 1, 128, 256, (1, 512), (1, 7), 2),
    ("cnn_1d.7", 8, 256, 256, (1, 256), (1, 7), 1),
]
FIRST_LAYERS = {  # filters, kernel, stride, padding, side of the output
    "vgg16.conv1_1": (64, 3, 1, 1, 224),
    "resnet50.conv1": (64, 7, 2, 3, 112),
    "mobilenet_v2.conv1": (32, 3, 2, 1, 112),
    "vit_b_16.patches": (768, 16, 16, 0, 14),
}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def make(shape, dtype, layout):
    torch.manual_seed(0)
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=layout)


def compare(benchmark, title, aten, compiled):
    """Times both, in turns."""

    def timed(run):
        result = run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    def the_other():
        start = perf_counter()
        timed(aten)
        others.append(perf_counter() - start)

    others: list[float] = []
    benchmark.name = title
    benchmark.pedantic(timed, (compiled,), setup=the_other, rounds=ROUNDS, warmup_rounds=2)
    if benchmark.stats is not None:  # None with --benchmark-disable
        ours = benchmark.stats.stats.data
        others = others[-len(ours) :]
        ratios = [other / own for other, own in zip(others, ours, strict=True)]
        benchmark.extra_info.update(aten_s=median(others), ratio=median(ratios))


def plain_divide(r, d):
    s = torch.where(d == 0, 0.0, r / d)
    return s, s.abs().amax()


def plain_split(a, b, r):
    size_a, size_b = a.abs(), b.abs()
    total = size_a + size_b
    share = torch.where(total == 0, 0.5, size_a / total)
    r_a = r * share
    return r_a, r - r_a


def plain_max_pool(x, r, kernel, stride, padding):
    if x.dim() == 3:  # as torch does it
        x, r = x.unsqueeze(2), r.unsqueeze(2)
        window = ([1, kernel], [1, stride], [0, padding], [1, 1], False)
    else:
        window = ([kernel] * 2, [stride] * 2, [padding] * 2, [1, 1], False)
    _, index = aten.max_pool2d_with_indices(x, *window)
    return aten.max_pool2d_with_indices_backward(r, x, *window, index)


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("kernel", ["divide", "multiply", "split"])
def test_elementwise(benchmark, kernel, name, dtype, layout):
    x, g, r = (make(ELEMENTWISE[name], dtype, layout) for _ in range(3))
    d = g.abs()
    sides = {
        "divide": (lambda: plain_divide(r, d), lambda: compiled.divide(r, d)),
        "multiply": (lambda: x.abs() * g, lambda: compiled.multiply(x, g, absolute=True)),
        "split": (lambda: plain_split(x, g, r), lambda: compiled.split(x, g, r)),
    }[kernel]
    compare(benchmark, f"{kernel} {name} {dtype} {layout}", *sides)


def compare_max_pool(benchmark, title, x, window):
    """The model's forward, and the relevance of its maxima."""
    r = torch.randn_like(POOLS[x.dim() - 3](x, *window))

    def there_and_back():
        _, winners = compiled.max_pool(x, *window)
        return compiled.max_unpool(r, winners, x.shape, *window)

    compare(benchmark, title, lambda: plain_max_pool(x, r, *window), there_and_back)


@pytest.mark.parametrize("name", MAX_POOLS)
def test_max_pool(benchmark, name, dtype, layout):
    shape, window = MAX_POOLS[name]
    title = f"max_pool {name} {dtype} {layout}"
    compare_max_pool(benchmark, title, make(shape, dtype, layout), window)


@pytest.mark.parametrize("window", [(4, 4, 0), (3, 2, 1)])
def test_max_pool_of_signals(benchmark, window, dtype):
    x = make((8 * MANY, 64, 8192), dtype, torch.contiguous_format)
    compare_max_pool(benchmark, f"max_pool signals {window} {dtype}", x, window)


@pytest.mark.parametrize("name", AVERAGE_POOLS)
def test_adaptive_avg_pool(benchmark, name, dtype, layout):
    shape, size = AVERAGE_POOLS[name]
    r = make((*shape[:2], *size), dtype, layout)
    x = make(shape, dtype, layout)
    compare(
        benchmark,
        f"adaptive_avg_pool {name} {dtype} {layout}",
        lambda: aten._adaptive_avg_pool2d_backward(r, x),
        lambda: compiled.adaptive_avg_pool(r, shape),
    )


def test_avg_pool(benchmark, dtype, layout):
    shape = (4 * MANY, 256, 56, 56)  # densenet121.transition1
    x, r = make(shape, dtype, layout), make((4 * MANY, 256, 28, 28), dtype, layout)
    two, none = [2, 2], [0, 0]
    compare(
        benchmark,
        f"avg_pool densenet121.transition1 {dtype} {layout}",
        lambda: aten.avg_pool2d_backward(r, x, two, two, none, False, True, None),
        lambda: compiled.avg_pool(r, shape, 2),
    )


def test_start_at_a_target(benchmark):
    weight, index = torch.randn(1000, 2048, device=DEVICE), torch.arange(8, device=DEVICE)
    one_hot = torch.nn.functional.one_hot(index, 1000).float()
    compare(
        benchmark,
        "start resnet50.fc",
        lambda: reference.linear(one_hot, weight),
        lambda: compiled.linear_rows(weight, index),
    )


@pytest.mark.parametrize("name", DENSE)
def test_dense_law(benchmark, name):
    rows, inner, out = DENSE[name]
    x, weight, r = (
        torch.randn(n, device=DEVICE) for n in ((rows, inner), (out, inner), (rows, out))
    )
    compare(
        benchmark,
        f"law of a dense layer {name}, {rows} rows",
        lambda: reference.linear_relevance(x, weight, r),
        lambda: compiled.linear_relevance(x, weight, r),
    )


@pytest.mark.parametrize("name", HEADS)
def test_matmul(benchmark, name):
    *heads, rows, inner, columns = HEADS[name]
    a = torch.randn(*heads, rows, inner, device=DEVICE)
    b = torch.randn(*heads, inner, columns, device=DEVICE)
    compare(
        benchmark,
        f"matmul {name}",
        lambda: reference.matmul(a, b),
        lambda: compiled.matmul(a, b),
    )


def compare_conv(benchmark, title, g, weight, shape, stride=1, padding=0):
    window = reference.Window([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1)
    compare(
        benchmark,
        title,
        lambda: reference.conv(g, weight, shape, window),
        lambda: compiled.conv(g, weight, shape, window),
    )


@pytest.mark.parametrize("name", FIRST_LAYERS)
def test_first_layer(benchmark, name, layout):
    filters, kernel, stride, padding, out = FIRST_LAYERS[name]
    g = make((2, filters, out, out), torch.float32, layout)
    weight = make((filters, 3, kernel, kernel), torch.float32, layout)
    title = f"first layer {name} {layout}"
    compare_conv(benchmark, title, g, weight, (2, 3, 224, 224), stride, padding)


@pytest.mark.parametrize(
    "shape", [(1, 512, 128, 28), (1, 1024, 256, 14), (8, 512, 2048, 7), (8, 320, 1280, 7)]
)
def test_pointwise_gradient(benchmark, shape):
    batch, channels, out, size = shape
    g = make((batch, out, size, size), torch.float32, torch.channels_last)
    weight = make((out, channels, 1, 1), torch.float32, torch.channels_last)
    title = f"pointwise {channels} to {out} at {size}, batch {batch}"
    compare_conv(benchmark, title, g, weight, (batch, channels, size, size))


def both_forward(x, weight, stride, padding):
    """Our filters, and oneDNN's convolution with a ReLU behind it and ours."""
    bias = torch.zeros(len(weight))
    filters = convolution.Filters(weight.contiguous(), None, bias, stride, padding)
    fused = (padding, stride, [1, 1], 1, "relu", [], "")
    return filters, (
        lambda: torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *fused),
        lambda: convolution.forward(x, filters, relu=True),
    )


@pytest.mark.skipif(DEVICE != "cpu", reason="a kernel for the CPU")
@pytest.mark.parametrize("name", [n for n, layer in FIRST_LAYERS.items() if layer[1] > layer[2]])
def test_first_layer_forward(benchmark, name):
    filters, kernel, stride, padding, _ = FIRST_LAYERS[name]
    x = make((2, 3, 224, 224), torch.float32, torch.channels_last)
    weight = make((filters, 3, kernel, kernel), torch.float32, torch.channels_last)
    _, sides = both_forward(x, weight, [stride, stride], [padding, padding])
    compare(benchmark, f"first layer forward {name}", *sides)


@pytest.mark.skipif(DEVICE != "cpu", reason="a kernel for the CPU")
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("direction", ["forward", "law"])
def test_convolution(benchmark, direction, layer):
    """Filters as each side likes them best: laid out as the image, and as modules have them."""
    name, batch, channels, out, size, taps, stride = layer
    strides, padding = [min(stride, k) for k in taps], [(k - 1) // 2 for k in taps]
    x = make((batch, channels, *size), torch.float32, torch.channels_last)
    weight = make((out, channels, *taps), torch.float32, torch.channels_last)
    filters, forwards = both_forward(x, weight, strides, padding)
    window = reference.Window(strides, padding, [1, 1], False, [0, 0], 1)
    x, r = x.abs(), torch.randn_like(convolution.forward(x, filters)[0])
    sides = {
        "forward": forwards,
        "law": (
            lambda: reference.conv_relevance(x, weight, r, window),
            lambda: compiled.conv_relevance(x, weight, r, window),
        ),
    }[direction]
    kind = "×".join(map(str, taps)) + (f" stride {stride}" if stride > 1 else "")
    compare(benchmark, f"{kind} {direction} {name}, batch {batch}", *sides)
