"""What samples are worth, as steering and fine-tuning measure it."""

import math

import torch
from torch import Tensor


def diversity(x: Tensor, y: Tensor) -> float:
    """The mean Euclidean distance of two samples of one class, mean over the classes; x `(n, *D)`, y `(n,)`."""
    return float(torch.stack([torch.pdist(x[y == label].flatten(1)).mean() for label in y.unique()]).mean())


def mean_and_error(r: Tensor) -> list[float]:
    """The mean, and its standard error."""
    return [float(r.mean()), float(r.std() / math.sqrt(len(r)))]
