#!/bin/sh
# What a GPU machine without a network needs, made on a machine without a GPU: both modules, which
# serve every Python from 3.10 on, for its architecture, and the wheels it lacks.
#   PYTHON=python3 scripts/gpu_prebuild.sh
# PYTHON has torch (2.11 or any later: one build serves them all), nvcc is on the PATH.
# Leaves ignored files only: captum_rlrp/*.so and build/gpu/wheels, which gpu_check.sh finds.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} wheels=build/gpu/wheels

folder=$(dirname "$("$python" -c 'import sys; print(sys.executable)')")
PATH="$folder:$PATH" CAPTUM_RLRP_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}" \
    "$python" setup.py --quiet build_ext --force --inplace --build-temp build/temp-gpu

rm -rf "$wheels"
for name in captum zennit; do  # of the versions that PYTHON has; pure Python, both of them
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$wheels" \
        "$name==$("$python" -c "from importlib.metadata import version
print(version('$name'))")"
done
ls -l captum_rlrp/*.abi3.so "$wheels"/*.whl
