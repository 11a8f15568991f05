#!/usr/bin/env bash
# A training that SIGKILL ends on its way and that is given again, beside one that nothing stops: how far their losses are
# apart. LATENTS is a folder of imagenet.encode.
#
#     PYTHON=.venv/bin/python DEVICE=cuda LATENTS=data/latents OUT=runs/killed bash benchmarks/killed.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cpu} OUT=${OUT:-runs/killed}
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
size=S/2 precision=bfloat16
if [ "$DEVICE" = cpu ]; then size=tiny precision=float32; fi
train="-m imagenet.train --stage flow --size $size --latents $LATENTS --batch 256 --lr 5e-4 --warmup 100 --clip 1"
train+=" --decay 0.998 --device $DEVICE --precision $precision --log-every 25 --steps 200 --checkpoint-every 20"
train+=" --sample-every 0"
mkdir -p "$OUT"

"$PYTHON" $train --out "$OUT/unbroken" 2>"$OUT/unbroken.txt"
"$PYTHON" $train --out "$OUT/stopped" >/dev/null 2>&1 &
while kill -0 $! 2>/dev/null && [ ! -d "$OUT/stopped/step-00000100" ]; do sleep 0.1; done
kill -KILL $!
wait $! || true
echo "killed with $(ls "$OUT/stopped" | grep step- | tr '\n' ' ')"
"$PYTHON" $train --out "$OUT/stopped" 2>"$OUT/stopped.txt"
"$PYTHON" - "$OUT" <<'PY'
import json, sys
a, b = ([json.loads(line) for line in open(f"{sys.argv[1]}/{name}/metrics.jsonl")] for name in ("unbroken", "stopped"))
assert [x["step"] for x in a] == [x["step"] for x in b] and len(a) == 9
print("largest difference of a logged loss:", max(abs(x["loss"] - y["loss"]) for x, y in zip(a, b)))
PY
