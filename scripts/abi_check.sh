#!/bin/sh
# One build of the extension, two versions of torch: it is built under the torch of PYTHON (default: python), and
# the kernel tests run with it there and, in a virtual environment that is thrown away, under the oldest
# torch that is supported. Downloads several GB. See docs/extension.md.
#   PYTHON=.venv/bin/python scripts/abi_check.sh [oldest torch, default 2.11.0]
set -eu
cd "$(dirname "$0")/.."
python=$("${PYTHON:-python}" -c 'import sys; print(sys.executable)')
oldest=${1:-2.11.0}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "== building under torch $("$python" -c 'import torch; print(torch.__version__)')"
mkdir "$work/copy"
cp -r captum_rlrp csrc tests setup.py pyproject.toml README.md LICENSE "$work/copy"
rm -f "$work"/copy/captum_rlrp/*.so
(cd "$work/copy" && PATH="$(dirname "$python"):$PATH" "$python" setup.py -q build_ext --inplace)

echo "== installing torch $oldest"
"$python" -m venv "$work/oldest"
"$work/oldest/bin/python" -m pip install -q --no-compile "torch==$oldest" \
    "captum>=0.9" matplotlib pillow hypothesis pytest pytest-timeout

for one in "$python" "$work/oldest/bin/python"; do
    (
        cd "$work/copy"
        export PYTHONPATH="$work/copy" CAPTUM_RLRP_BACKEND=compiled
        "$one" -c "import torch
from captum_rlrp.kernels import extension
print('== torch', torch.__version__, '; CUDA kernels:', extension.cuda_load_error() or 'loaded')
assert extension.available(), extension.load_error()"
        "$one" -m pytest -q -p no:cacheprovider tests/kernels -k "compiled or ops or convolution"
    )
done
echo "== one build, both torches"
