#!/bin/sh
# What a GPU machine without a network needs, made on a machine without a GPU: both modules for its
# Python and its architecture, and the wheels it lacks.
#   PYTHON=python3 TARGET=python3.12 scripts/gpu_prebuild.sh
# PYTHON has torch (2.11 or any later: one build serves them all), nvcc is on the PATH. TARGET is any
# Python of the version to build for; its headers are all that is used of it.
# Leaves ignored files only: captum_rlrp/*.so and build/gpu/wheels, which gpu_check.sh finds.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} target=${TARGET:-python3.12} wheels=build/gpu/wheels

ask() { "$target" -c "import sys, sysconfig; print($1)"; }
version=$(ask "'%d.%d' % sys.version_info[:2]")
headers=$(ask "sysconfig.get_path('include')")
suffix=$(ask "sysconfig.get_config_var('EXT_SUFFIX')")
[ -f "$headers/Python.h" ] || { echo "$target has no headers: $headers/Python.h" >&2; exit 1; }

folder=$(dirname "$("$python" -c 'import sys; print(sys.executable)')")
# --force: setuptools looks at no header; ninja does, and compiles only what has changed.
PATH="$folder:$PATH" CFLAGS="-I$headers" SETUPTOOLS_EXT_SUFFIX="$suffix" CAPTUM_RLRP_CUDA=1 \
    TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}" \
    "$python" setup.py --quiet build_ext --force --inplace --build-temp "build/temp-$version"

rm -rf "$wheels"
for name in captum zennit; do  # of the versions that PYTHON has
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" \
        --dest "$wheels" "$name==$("$python" -c "from importlib.metadata import version
print(version('$name'))")"
done
echo "for Python $version:"
ls -l captum_rlrp/*"$suffix" "$wheels"/*.whl
