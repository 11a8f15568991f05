#!/usr/bin/env bash
# The whole ImageNet rung on MNIST turned into latents, by its own commands, with the numbers of each stage.
#
#     PYTHON=.venv/bin/python DEVICE=cuda DATA=data/mnist OUT=runs/ladder bash benchmarks/ladder.sh
#
# DATA has the four idx files of MNIST. TRY=1 takes a few steps of everything, to see that it runs. Each command goes on
# where it was stopped when the script is run again. What is worth keeping is copied to OUT/results.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cpu} DATA=${DATA:-data/mnist} OUT=${OUT:-runs/ladder} TRY=${TRY:-0}
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
steps() { [ "$TRY" = 1 ] && echo 2 || echo "$1"; }
size=S/2 precision=bfloat16
if [ "$DEVICE" = cpu ]; then size=tiny precision=float32; fi
mkdir -p "$OUT/results"
began=$SECONDS

stage() {  # a title, then the command
    local title=$1 from=$SECONDS
    shift
    echo "== $title: $*" | sed "s#$OUT#OUT#g; s#$PYTHON#python#g"
    "$PYTHON" -m "$@" 2> >(tr '\r' '\n' | tail -n 3 >&2)
    echo "   $((SECONDS - from)) s"
}

latents=$OUT/latents vae=$OUT/mnist/vae
stage "images and autoencoder" benchmarks.mnist_latents --data "$DATA" --out "$OUT/mnist" --device "$DEVICE" \
    --steps "$(steps 1500)" --count "$([ "$TRY" = 1 ] && echo 600 || echo 0)"
stage encode imagenet.encode --images "$OUT/mnist/images" --vae "$vae" --out "$latents" --size 32 --no-flips \
    --device "$DEVICE" --batch 256 --workers 4

train="--latents $latents --batch 256 --lr 5e-4 --warmup 100 --clip 1 --decay 0.998 --device $DEVICE --vae $vae"
train+=" --precision $precision --samples 1024 --log-every 25"

# Killed by SIGKILL on its way and given again: the same losses as a run that was not.
resume="imagenet.train --stage flow --size $size $train --steps $(steps 200) --checkpoint-every 20 --sample-every 0"
stage "unbroken" $resume --out "$OUT/unbroken"
"$PYTHON" -m $resume --out "$OUT/killed" >/dev/null 2>&1 &
while kill -0 $! 2>/dev/null && [ ! -d "$OUT/killed/step-00000100" ]; do sleep 0.1; done
kill -KILL $! 2>/dev/null || true
wait $! 2>/dev/null || true
echo "   killed after: $(ls "$OUT/killed" | grep step- | tr '\n' ' ')"
stage "killed, given again" $resume --out "$OUT/killed"
"$PYTHON" - "$OUT" <<'PY'
import json, sys
a, b = ([json.loads(line) for line in open(f"{sys.argv[1]}/{name}/metrics.jsonl")] for name in ("unbroken", "killed"))
assert [x["step"] for x in a] == [x["step"] for x in b]
print("   largest difference of a logged loss:", max(abs(x["loss"] - y["loss"]) for x, y in zip(a, b)))
PY

stage "flow" imagenet.train --stage flow --size $size $train --steps "$(steps 2000)" --sample-every "$(steps 1000)" \
    --out "$OUT/flow"
stage "map" imagenet.train --stage map $train --init "$OUT/flow/weights" --steps "$(steps 600)" \
    --sample-every "$(steps 300)" --out "$OUT/map"
stage "mfm" imagenet.train --stage mfm $train --init "$OUT/map/weights" --teacher "$OUT/flow/weights" --reads-tx \
    --teacher-scale 1 --steps "$(steps 1200)" --sample-every "$(steps 600)" --out "$OUT/mfm"

common="--weights $OUT/mfm/weights --vae $vae --device $DEVICE --precision $precision"
features="--features benchmarks.mnist_latents:pooled"
for n in 1 4; do
    stage "sample, $n draws" imagenet.sample $common --count "$(steps 1024)" --batch 512 --steps $n --out "$OUT/sample-$n"
done
stage posterior imagenet.posterior $common --latents "$latents" --teacher "$OUT/flow/weights" --contexts "$((TRY ? 4 : 32))" \
    --draws 24 --times 0.1,0.3,0.5,0.7 --methods mfm,glass,sde,again --map-steps 1,2,4 --glass-steps 1,4,16 \
    --sde-steps "$(steps 64)" --batch 512 --out "$OUT/posteriors"
stage recovery imagenet.evaluate recovery --posteriors "$OUT/posteriors" $features --device "$DEVICE"
stage values imagenet.evaluate values --posteriors "$OUT/posteriors" --reward brightness --scale 20 --device "$DEVICE"

# Steering and fine-tuning to bold digits, by the mean brightness of the picture. Measured beside it: whether a three is
# still one (1, where others are -1), and the compressed size.
held="--reward brightness --held-out probe=$OUT/mnist/three.safetensors;compressed-size"
stage steer imagenet.steer $common $held --scale 40 --labels 3 --count "$(steps 256)" --batch 256 --steps "$(steps 50)" \
    --methods base,mfm-g,mfm-c,mfm-gf,dps,search,best-of-n --draws 1,4,16 --out "$OUT/steered"
stage fine-tune imagenet.finetune $common $held --latents "$latents" --scale 40 --batch 128 --steps "$(steps 400)" \
    --lr 2e-4 --warmup 50 --decay 0.99 --evaluate 240 --evaluate-batch 240 --evaluate-every "$(steps 200)" \
    --out "$OUT/finetuned"
stage "sample the fine-tuned" imagenet.sample --weights "$OUT/finetuned/weights" --device "$DEVICE" \
    --precision $precision --method euler --steps "$(steps 50)" --count "$(steps 4096)" --batch 512 \
    --out "$OUT/finetuned-latents"
stage "map of the fine-tuned" imagenet.train --stage map --latents "$OUT/finetuned-latents/latents.npz" --batch 256 \
    --init "$OUT/map/weights" --teacher "$OUT/finetuned/weights" --teacher-scale 1 --drop 0 --lr 5e-4 --warmup 100 \
    --clip 1 --decay 0.998 --device "$DEVICE" --precision $precision --vae "$vae" --samples 1024 --log-every 25 \
    --steps "$(steps 400)" --sample-every "$(steps 200)" --out "$OUT/finetuned-map"
