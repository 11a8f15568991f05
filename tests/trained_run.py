"""What test_imagenet_train.py has torchrun start: the script on two processes, on either engine, from an open folder.

torchrun --nproc-per-node 2 -m tests.trained_run FOLDER "OPTIONS" NAME=ENGINE …
"""

import dataclasses
import sys
from pathlib import Path

import torch

from imagenet import train
from imagenet.presets import TrainOptions
from mfm_ref.distributed import processes
from mfm_ref.options import parse

if __name__ == "__main__":
    folder, options, *runs = sys.argv[1:]
    torch.set_num_threads(1)
    config = parse(TrainOptions, "", options.split())
    with processes() as here:
        for run in runs:
            name, engine = run.split("=")
            train.run(dataclasses.replace(config, out=Path(folder) / name, engine=engine), here)
