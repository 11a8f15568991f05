#!/usr/bin/env bash
# All that needs a GPU, in one run of six minutes: the tests that are skipped elsewhere, the speed of SiT-XL/2, and
# samples of a network of that size with random weights by the script itself.
#
#     PYTHON=.venv/bin/python OUT=runs/gpu COMMIT=$(git rev-parse --short HEAD) bash benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-runs/gpu} COMMIT=${COMMIT:-}
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
mkdir -p "$OUT"
failed=0

"$PYTHON" -m pytest -q -o addopts= -o filterwarnings= -p no:cacheprovider --show-capture=no tests/test_imagenet_cuda.py \
    2>&1 | tee "$OUT/tests.txt" || failed=1

"$PYTHON" -m benchmarks.imagenet --device cuda --batches 128,32 --commit "$COMMIT" --out "$OUT" || failed=1

weights=$(mktemp -d)
"$PYTHON" -c "
from benchmarks.imagenet import ImagenetConfig, random_network
from mfm_ref import FlowMap
FlowMap(random_network(ImagenetConfig(device='cpu'))).save_pretrained('$weights/map')
" && "$PYTHON" -m imagenet.sample --weights "$weights/map" --guidance 2.5 --count 1024 --batch 128 --steps 4 \
    --device cuda --precision bfloat16 --compile --out "$weights/samples" 2>&1 | tee "$OUT/sample.txt" || failed=1
rm -r "$weights"
exit $failed
