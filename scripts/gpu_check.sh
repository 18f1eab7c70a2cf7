#!/bin/sh
# Everything that only a GPU can show, in one report: build, tests on the GPU, compute-sanitizer, speed.
#   PYTHON=python3 scripts/gpu_check.sh [report.txt [build] [tests] [models] [breakdown] [kernels] [sanitizer]]
# Without names it does all of it, in that order.
# Exits non-zero if any part failed; the report then says which.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
report=${1:-gpu-report.txt}
[ $# -eq 0 ] || shift
parts=$*
failed=""
: > "$report"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"  # what is tested, installed or not

say() { echo "$@" | tee -a "$report"; }

chosen() {
    case " ${parts:-$1} " in *" $1 "*) return 0 ;; *) return 1 ;; esac
}

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
if chosen build; then
    part "build" env CAPTUM_RLRP_CUDA=1 MAX_JOBS="${MAX_JOBS:-4}" "$python" setup.py build_ext --inplace
fi
part "configuration" "$python" -c \
    "from captum_rlrp.kernels import show_config
for item in show_config().items(): print(*item, sep=': ')"
if chosen tests; then
    # Kernels against float64 on the CPU, whole models, other streams, a second device where there is one.
    part "gpu tests" "$python" -m pytest tests -q -m gpu
fi
# Convolutions in float32 use TF32, as is torch's default.
figures=build/gpu
for dtype in float32 bfloat16; do
    if chosen models; then
        part "models, $dtype" "$python" benchmarks/run.py --out $figures --device cuda --dtype "$dtype" \
            --models resnet50 vgg16 --batches 1 64 --repeats 10
        part "models, $dtype, channels_last" "$python" benchmarks/run.py --out $figures --device cuda \
            --dtype "$dtype" --channels-last --models resnet50 vgg16 --batches 1 64 --repeats 10 \
            --methods "Relative LRP" "Relative LRP, CUDA graph" InputXGradient "the floor" --no-memory
    fi
    if chosen breakdown; then
        part "breakdown, $dtype" "$python" benchmarks/breakdown.py --out $figures --device cuda \
            --dtype "$dtype"
    fi
done
if chosen kernels; then
    part "kernels" "$python" benchmarks/run.py --out $figures --kernels
fi
if [ -f $figures/docs/benchmarks.md ]; then
    KEEP_LINES=500 part "figures" cat $figures/docs/benchmarks.md
fi
if chosen sanitizer; then
    if command -v compute-sanitizer > /dev/null; then
        small="test_elementwise.py or test_pooling.py or test_gpu.py"
        for tool in memcheck racecheck; do
            part "compute-sanitizer $tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
                "$python" -m pytest tests/kernels -q -m gpu -k "$small"
        done
    else
        say ""
        say "-- compute-sanitizer: not installed, NOT RUN"
        failed="$failed compute-sanitizer not installed;"
    fi
fi

say ""
if [ -n "$failed" ]; then
    say "FAILED:$failed"
    exit 1
fi
say "all parts passed"
