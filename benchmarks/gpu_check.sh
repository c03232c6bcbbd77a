#!/bin/sh
# Verifies, then times, every kernel on this machine's GPU. Needs torch and triton, nothing else; not even an install.
#   benchmarks/gpu_check.sh --quick      at most 4 minutes
#   benchmarks/gpu_check.sh --part 1     the whole, in two runs of at most 8 minutes
#   benchmarks/gpu_check.sh --part 2
#   benchmarks/gpu_check.sh --emulate 90  the checks of kernels, without a GPU: what is compiled for sm_90 is executed here
#   benchmarks/gpu_check.sh --dry        tiny shapes under Triton's interpreter, without a GPU
here=$(cd "$(dirname "$0")" && pwd)
PYTHONPATH="$here/../src:$here/../tests${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" "$here/gpu_check.py" "$@"
