"""The commands of the ImageNet rung, one after the other, as a user types them: on one process or under torchrun.

`torchrun --nproc-per-node 2 -m tests.ladder_run HOME` runs in HOME, a folder with images, an autoencoder and latents.
"""

import importlib
import os
import sys
from pathlib import Path

from mfm_ref.distributed import gather, processes

TRAIN = "--latents latents --vae vae --batch 8 --steps 3 --lr 3e-3 --warmup 0 --sample-every 3 --samples 6"
MAP = "--weights mfm/weights --vae vae --guidance 2.5 --batch 4"
# Each stage begins with the weights of the one before.
COMMANDS = (
    f"train --stage flow --size tiny {TRAIN} --out flow",
    f"train --stage map --init flow/weights --guidance 2.5 --guided-from 0.3 {TRAIN} --out map",
    f"train --stage mfm --init map/weights --teacher map/weights --teacher-scale 2.5 --guidance 2.5 --reads-tx {TRAIN} "
    "--out mfm",
    f"sample {MAP} --count 8 --steps 2 --out samples",
    f"posterior {MAP} --latents latents --contexts 4 --draws 3 --times 0.2 --methods mfm,glass,sde,again "
    "--map-steps 1,2 --glass-steps 2 --sde-steps 4 --out posteriors",
    f"steer {MAP} --methods base,mfm-g,mfm-gf,mfm-c,dps,search,best-of-n --draws 2 --count 4 --steps 2 --scale 20 "
    "--reward redness --held-out brightness;compressed-size --out steered",
    f"finetune {MAP} --latents latents --steps 2 --warmup 0 --lr 1e-3 --scale 20 --reward redness "
    "--held-out brightness --evaluate 8 --evaluate-every 2 --evaluate-steps 2 --out tuned",
    "sample --weights tuned/weights --guidance 2.5 --method euler --steps 2 --count 8 --batch 4 --out of-tuned",
    f"train --stage map --init map/weights --teacher tuned/weights --teacher-scale 1 --guidance 2.5 --drop 0 "
    f"{TRAIN.replace('latents latents', 'latents of-tuned/latents.npz')} --out tuned-map",
)
# These have one process.
MEASURES = (
    "evaluate fid --samples samples/samples.npz --reference posteriors/clean/samples.npz "
    "--features tests.test_imagenet_ladder:mean_colours",
    "evaluate recovery --posteriors posteriors --features tests.test_imagenet_ladder:mean_colours",
    "evaluate values --posteriors posteriors --reward redness --scale 5",
    "compare --values posteriors/values-redness.json --steer steered --finetune tuned --out compared",
)


def run(commands: tuple[str, ...], home: Path) -> None:
    """The commands, in a folder."""
    before = Path.cwd()
    os.chdir(home)
    try:
        for line in commands:
            name, *arguments = line.split()
            importlib.import_module(f"imagenet.{name}").main(arguments)
            gather(name)  # all wait for the slowest, as the end of a torchrun does
    finally:
        os.chdir(before)


if __name__ == "__main__":
    with processes():  # one group for all: torchrun's store serves a second one badly
        run(COMMANDS, Path(sys.argv[1]))
