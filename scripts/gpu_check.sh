#!/bin/sh
# Everything that only a GPU can show, in one report: build, tests on the GPU, compute-sanitizer, speed.
#   PYTHON=python3 scripts/gpu_check.sh [report.txt]
# Exits non-zero if any part failed; the report then says which.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
report=${1:-gpu-report.txt}
failed=""
: > "$report"

say() { echo "$@" | tee -a "$report"; }

part() {
    name=$1
    shift
    say ""
    say "== $name"
    say "\$ $*"
    if "$@" > "$report.part" 2>&1; then result=passed; else result="FAILED ($?)"; fi
    tail -n "${KEEP_LINES:-60}" "$report.part" | tee -a "$report"
    rm -f "$report.part"
    say "-- $name: $result"
    [ "$result" = passed ] || failed="$failed $name;"
}

say "captum_rlrp on a GPU, $(date -u '+%Y-%m-%d %H:%M UTC'), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
part "device" nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
part "build" env CAPTUM_RLRP_CUDA=1 MAX_JOBS="${MAX_JOBS:-4}" \
    "$python" -m pip install --no-build-isolation --no-deps -e .
part "configuration" "$python" -c \
    "from captum_rlrp.kernels import show_config
for item in show_config().items(): print(*item, sep=': ')"
# Kernels against float64 on the CPU, whole models, other streams, a second device where there is one.
part "gpu tests" "$python" -m pytest tests -q -m gpu
if command -v compute-sanitizer > /dev/null; then
    small="test_elementwise.py or test_pooling.py or test_gpu.py"
    for tool in memcheck racecheck; do
        part "compute-sanitizer $tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
            "$python" -m pytest tests/kernels -q -m gpu -k "$small" --timeout 3600
    done
else
    say ""
    say "-- compute-sanitizer: not installed, NOT RUN"
    failed="$failed compute-sanitizer not installed;"
fi
# Convolutions in float32 use TF32, as is torch's default.
figures=build/gpu
bench="benchmarks/run.py --out $figures"
part "kernels" "$python" $bench --kernels
for dtype in float32 bfloat16; do
    part "models, $dtype" "$python" $bench --device cuda --dtype "$dtype" \
        --models resnet50 vgg16 --batches 1 64 --repeats 10
done
KEEP_LINES=500 part "figures" cat "$figures/docs/benchmarks.md"

say ""
if [ -n "$failed" ]; then
    say "FAILED:$failed"
    exit 1
fi
say "all parts passed"
