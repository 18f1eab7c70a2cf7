#!/bin/bash
# What only a GPU can show, the most telling first, within a budget of seconds.
#   OUT=folder PYTHON=python3 scripts/gpu_check.sh [seconds, 540] [part ...]
# Parts, in this order; without names all of them:
#   device load agree kernels speed breakdown models peers memcheck racecheck
# Each has a limit, and no more of the time left than its share: one that hangs takes nothing from the
# others, and what one does not use, later ones may. Modules that do not load are built, once.
# All is written as it happens: figures and results as lines of JSON to results.jsonl, ends of the
# outputs to report.txt, all output to full.log. Exits non-zero if any part failed.
# Without a network: scripts/gpu_prebuild.sh makes what has to be brought along.
# Rehearsal: DEVICE=cpu takes tiny sizes; FAKES is a folder of commands, by the names of parts, that
# run in their place.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-build/gpu} device=${DEVICE:-cuda} budget=${1:-540}
[ $# -eq 0 ] || shift
parts=${*:-device load agree kernels speed breakdown models peers memcheck racecheck}
mkdir -p "$out"
out=$(cd "$out" && pwd)
results=$out/results.jsonl report=$out/report.txt log=$out/full.log
started=$SECONDS failed=""
: > "$results"; : > "$report"; : > "$log"

say() { echo "$@" | tee -a "$report" "$log"; }

limit_of() {
    case $1 in
        device) echo 15 ;;
        load) echo 40 ;;
        build) echo 240 ;;
        speed) echo 120 ;;
        kernels | models) echo 90 ;;
        *) echo 60 ;;
    esac
}

share_of() {  # of the time left, among this part and those after it; at most the part's limit
    local limit sum=0 found="" each left=$((budget - SECONDS + started))
    limit=$(limit_of "$1")
    for each in $parts; do
        [ "$each" != "$1" ] || found=yes
        [ -z "$found" ] || sum=$((sum + $(limit_of "$each")))
    done
    [ "$sum" -ge "$limit" ] || sum=$limit
    [ "$left" -ge "$sum" ] || limit=$(((left * limit + sum - 1) / sum))
    [ "$limit" -le "$left" ] || limit=$left
    echo "$limit"
}

part() {  # name, lines of its output to show, command ...
    local name=$1 lines=$2 from=$SECONDS before code result=passed limit
    shift 2
    case " $parts build " in *" $name "*) ;; *) return 0 ;; esac
    [ -z "${FAKES:-}" ] || [ ! -x "$FAKES/$name" ] || set -- "$FAKES/$name"
    limit=$(share_of "$name")
    if [ "$limit" -lt 1 ]; then
        result="not run, no time left" code=124
    else
        say "== $name, at most $limit s: $*"
        before=$(stat -c %s "$log")
        timeout -k 2 "$limit" "$@" >> "$log" 2>&1 < /dev/null
        code=$?
        tail -c +$((before + 1)) "$log" | tail -n "$lines" >> "$report"
        tail -c +$((before + 1)) "$log" | tail -n "$lines"
        case $code in 0) ;; 124 | 137) result="stopped at its limit" ;; *) result="failed ($code)" ;; esac
    fi
    say "-- $name: $result, $((SECONDS - from)) s; $((budget - SECONDS + started)) s left"
    printf '{"part": "%s", "result": "%s", "seconds": %d}\n' \
        "$name" "$result" $((SECONDS - from)) >> "$results"
    [ "$code" -eq 0 ] || failed="$failed $name"
    return "$code"
}

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if ! "$python" -c 'import sys; from importlib.util import find_spec as find
sys.exit(not (find("captum") and find("zennit")))'; then
    for wheel in build/gpu/wheels/*.whl; do  # they hold nothing but Python
        [ ! -f "$wheel" ] || "$python" -m zipfile -e "$wheel" "$site"
    done
fi
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
figures="$python -W ignore benchmarks/gpu.py --out $results --device $device"
tests="$python -m pytest -q -p no:cacheprovider --timeout 60 --tb=short --maxfail 20"
if [ "$device" = cuda ]; then
    tests="$tests -m gpu -n ${JOBS:-8}"
    kernel_tests="tests/kernels" model_tests="tests/test_on_gpu.py"
    show="nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv"
else
    kernel_tests="tests/kernels/test_ops.py -k opcheck" model_tests="tests/test_recording.py"
    show="uname -srm"
fi

sanitizer() {  # of our kernels alone
    [ "$device" = cpu ] || echo "compute-sanitizer --tool $1 --error-exitcode 9 --kernel-regex kns=rlrp"
}

say "captum_rlrp, $(date -u '+%Y-%m-%d %H:%M UTC'), commit $(git rev-parse --short HEAD 2> /dev/null || echo unknown)"
# Commands are words without spaces in them.
part device 4 $show
part load 12 $figures load
loaded=$?
# One that was stopped, or not run, says nothing of the modules.
if [ $loaded -ne 0 ] && [ $loaded -lt 124 ]; then
    failed=${failed% load}  # what counts is how it ends
    part build 10 env CAPTUM_RLRP_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 MAX_JOBS=16 \
        "$python" setup.py -q build_ext --inplace
    part load 12 $figures load
fi
part agree 14 $figures agree
part kernels 25 $tests $kernel_tests
part speed 30 $figures speed
part breakdown 40 $figures breakdown
part models 25 $tests $model_tests
part peers 15 $figures peers
part memcheck 15 $(sanitizer memcheck) $figures every_op
part racecheck 15 $(sanitizer racecheck) $figures every_op

[ -z "$failed" ] || { say "FAILED:$failed"; exit 1; }
say "all parts passed"
