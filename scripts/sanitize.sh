#!/bin/sh
# Runs the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer, and the torch-free cores
# under ThreadSanitizer. See docs/extension.md. PYTHON names the interpreter (default: python).
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
cxx=${CXX:-c++}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "== ThreadSanitizer: torch-free cores"
"$cxx" -std=c++20 -O1 -g -fsanitize=thread -fopenmp-simd -Icsrc \
    tests/kernels/cores.cpp -o "$work/cores_tsan" -lpthread
"$work/cores_tsan"

echo "== AddressSanitizer, UndefinedBehaviorSanitizer: torch-free cores"
"$cxx" -std=c++20 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fopenmp-simd \
    -Icsrc tests/kernels/cores.cpp -o "$work/cores_asan" -lpthread
"$work/cores_asan"

echo "== AddressSanitizer, UndefinedBehaviorSanitizer: kernel tests"
# A build of its own, beside the normal one: the package is copied, the extension built into the copy.
cp -r captum_rlrp csrc tests setup.py pyproject.toml "$work"
[ ! -f README.md ] || cp README.md "$work"
rm -f "$work"/captum_rlrp/*.so
(
    cd "$work"
    CAPTUM_RLRP_CUDA=0 CAPTUM_RLRP_SANITIZE=address,undefined \
        "$python" setup.py -q build_ext --inplace
    asan=$("$cxx" -print-file-name=libasan.so)
    ubsan=$("$cxx" -print-file-name=libubsan.so)
    stdcxx=$("$cxx" -print-file-name=libstdc++.so)
    # Python and torch leak on purpose at exit; torch's own code is not instrumented.
    LD_PRELOAD="$asan $ubsan $stdcxx" \
        ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 \
        UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
        CAPTUM_RLRP_BACKEND=compiled PYTHONPATH="$work" \
        "$python" -m pytest tests/kernels -q -p no:cacheprovider -k "${SANITIZE_TESTS:-compiled or ops or convolution or linear or matmul}"
)
echo "== clean"
