#!/usr/bin/env bash
# What training, steering and fine-tuning need a GPU for, in one run, of ten minutes or more: the speed of a training step
# of SiT-XL/2 beside the released composition, guided steps, and the whole ladder on MNIST turned into latents.
#
#     PYTHON=.venv/bin/python DATA=data/mnist OUT=runs/gpu-training COMMIT=$(git rev-parse --short HEAD) \
#         bash benchmarks/gpu-training.sh
#
# The ladder runs while the benchmark compiles, and stands still while it measures.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3} OUT=${OUT:-runs/gpu-training} DATA=${DATA:-data/mnist} COMMIT=${COMMIT:-}
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
mkdir -p "$OUT"
failed=0

export DEVICE=cuda LADDER=${LADDER:-$OUT/ladder}
setsid bash -c 'OUT=$LADDER bash benchmarks/ladder.sh && LATENTS=$LADDER/latents OUT=$LADDER/killed bash benchmarks/killed.sh' \
    >"$OUT/ladder.txt" 2>&1 &
ladder=$!
"$PYTHON" -m benchmarks.imagenet_training --device cuda --commit "$COMMIT" --out "$OUT" 2>&1 | while read -r line; do
    echo "$line"
    [ "$line" = measuring ] && kill -STOP -- -$ladder && sleep 1
done
[ "${PIPESTATUS[0]}" = 0 ] || failed=1
kill -CONT -- -$ladder 2>/dev/null
wait $ladder || failed=1
cat "$OUT/ladder.txt"
exit $failed
