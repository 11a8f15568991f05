"""Rewards of images: brightness and other statistics, a linear probe, PickScore, HPSv2.1, ImageReward, and sums.

`load_reward` gives one by its name, `load` a published model by its files, and `LatentReward` makes one of latents.
"""

from imagenet.rewards.latents import LatentReward
from imagenet.rewards.models import load
from imagenet.rewards.pixels import CompressedSize, LinearProbe, brightness, contrast, redness
from imagenet.rewards.specs import REWARDS, RewardSum, Term, load_reward, slug

__all__ = [
    "REWARDS",
    "CompressedSize",
    "LatentReward",
    "LinearProbe",
    "RewardSum",
    "Term",
    "brightness",
    "contrast",
    "load",
    "load_reward",
    "redness",
    "slug",
]
