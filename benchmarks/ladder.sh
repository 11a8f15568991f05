#!/usr/bin/env bash
# The whole ImageNet rung on MNIST turned into latents, by its own commands, with the numbers of each stage.
#
#     PYTHON=.venv/bin/python DEVICE=cuda DATA=data/mnist OUT=runs/ladder bash benchmarks/ladder.sh
#
# DATA has the four idx files of MNIST. TRY=1 takes a few steps of everything, to see that it runs. Each command goes on
# where it was stopped when the script is run again.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cpu} DATA=${DATA:-data/mnist} OUT=${OUT:-runs/ladder} TRY=${TRY:-0}
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
steps() { [ "$TRY" = 1 ] && echo 2 || echo "$1"; }
size=S/2 precision=bfloat16 batch=256 autoencoder="--steps $(steps 700) --batch 128"
if [ "$DEVICE" = cpu ]; then size=tiny precision=float32 batch=64 autoencoder="--steps $(steps 300) --batch 64"; fi
mkdir -p "$OUT"

stage() {  # a title, then the command
    local title=$1 from=$SECONDS
    shift
    echo "== $title: $*" | sed "s#$OUT#OUT#g; s#$PYTHON#python#g"
    "$PYTHON" -m "$@" 2> >(tr '\r' '\n' | tail -n 3 >&2)
    echo "   $((SECONDS - from)) s"
}

latents=$OUT/latents vae=$OUT/mnist/vae
stage "images and autoencoder" benchmarks.mnist_latents --data "$DATA" --out "$OUT/mnist" --device "$DEVICE" \
    $autoencoder --count "$([ "$TRY" = 1 ] && echo 600 || echo 20000)"
stage encode imagenet.encode --images "$OUT/mnist/images" --vae "$vae" --out "$latents" --size 32 --no-flips \
    --device "$DEVICE" --batch 256 --workers 2

train="--latents $latents --batch $batch --lr 5e-4 --warmup 100 --clip 1 --decay 0.998 --device $DEVICE --vae $vae"
train+=" --precision $precision --samples 1024 --log-every 25"

stage "flow" imagenet.train --stage flow --size $size $train --steps "$(steps 1200)" --sample-every "$(steps 600)" \
    --out "$OUT/flow"
stage "map" imagenet.train --stage map $train --init "$OUT/flow/weights" --steps "$(steps 250)" \
    --sample-every "$(steps 250)" --out "$OUT/map"
stage "mfm" imagenet.train --stage mfm $train --init "$OUT/map/weights" --teacher "$OUT/flow/weights" --reads-tx \
    --teacher-scale 1 --steps "$(steps 600)" --sample-every "$(steps 300)" --out "$OUT/mfm"

common="--weights $OUT/mfm/weights --vae $vae --device $DEVICE --precision $precision"
# Steering and fine-tuning to bold digits, by the mean brightness of the picture. Measured beside it: whether a three is
# still one (1, where others are -1), and the compressed size.
held="--reward brightness --held-out probe=$OUT/mnist/three.safetensors;compressed-size"

# What follows has three parts that do not need each other.
measure() {
    features="--features benchmarks.mnist_latents:pooled"
    for n in 1 4; do
        stage "sample, $n draws" imagenet.sample $common --count "$(steps 1024)" --batch 512 --steps $n --out "$OUT/sample-$n"
    done
    stage posterior imagenet.posterior $common --latents "$latents" --teacher "$OUT/flow/weights" --contexts "$((TRY ? 4 : 32))" \
        --draws 24 --times 0.1,0.3,0.5,0.7 --methods mfm,glass,sde,again --map-steps 1,2,4 --glass-steps 1,4,16 \
        --sde-steps "$(steps 64)" --batch 512 --out "$OUT/posteriors"
    stage recovery imagenet.evaluate recovery --posteriors "$OUT/posteriors" $features --device "$DEVICE"
    stage values imagenet.evaluate values --posteriors "$OUT/posteriors" --reward brightness --scale 20 --device "$DEVICE"
}
tune() {
    stage fine-tune imagenet.finetune $common $held --latents "$latents" --scale 40 --batch 128 --steps "$(steps 400)" \
        --lr 2e-4 --warmup 50 --decay 0.99 --evaluate 240 --evaluate-batch 240 --evaluate-every "$(steps 200)" \
        --out "$OUT/finetuned"
    stage "sample the fine-tuned" imagenet.sample --weights "$OUT/finetuned/weights" --device "$DEVICE" \
        --precision $precision --method euler --steps "$(steps 50)" --count "$(steps 4096)" --batch 512 \
        --out "$OUT/finetuned-latents"
    stage "map of the fine-tuned" imagenet.train --stage map --latents "$OUT/finetuned-latents/latents.npz" --batch $batch \
        --init "$OUT/map/weights" --teacher "$OUT/finetuned/weights" --teacher-scale 1 --drop 0 --lr 5e-4 --warmup 100 \
        --clip 1 --decay 0.998 --device "$DEVICE" --precision $precision --vae "$vae" --samples 1024 --log-every 25 \
        --steps "$(steps 400)" --sample-every "$(steps 200)" --out "$OUT/finetuned-map"
}
steering() {
    stage steer imagenet.steer $common $held --scale 40 --labels 3 --count "$(steps 256)" --batch 256 --steps "$(steps 50)" \
        --methods base,mfm-g,mfm-c,mfm-gf,dps,search,best-of-n --draws 1,4,16 --out "$OUT/steered"
}
parts="measure tune steering" failed=0
for part in $parts; do
    $part >"$OUT/$part.txt" 2>&1 &
done
for part in $parts; do
    wait -n || failed=1
done
for part in $parts; do cat "$OUT/$part.txt"; done
exit $failed
