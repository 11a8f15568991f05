"""What a run costs: network and reward evaluations, counted while it runs and by formula, seconds and memory."""

import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mfm_ref.checks import Reward, Time, check_count, check_uncoupled
from mfm_ref.flow_map import MetaFlowMap


@dataclasses.dataclass
class Cost:
    """Evaluations, each of one row (one state), of the map and of the reward, forward and backward.

    Not among them: a few rows that are evaluated once per run, to check that the reward takes its rows one by one
    (`check_uncoupled`) and to measure how many fit the memory (`rows_within`).
    """

    samples: int  # that the run returned
    map_forward: int = 0
    map_backward: int = 0
    reward_forward: int = 0
    reward_backward: int = 0
    seconds: float = 0.0
    peak_memory: int = 0  # bytes: on a GPU, allocated in this run; on a CPU, of the whole process so far

    @property
    def evaluations(self) -> float:
        """Per sample, in the paper's accounting: a forward or a backward pass of the map or of the reward counts 1."""
        total = self.map_forward + self.map_backward + self.reward_forward + self.reward_backward
        return total / self.samples

    def __add__(self, other: "Cost") -> "Cost":
        """Of two runs, one after the other."""
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)}
        return Cost(**sums | {"peak_memory": max(self.peak_memory, other.peak_memory)})


def evaluations(
    method: str, steps: int, *, n: int = 1, m: int = 1, guided: int | None = None, posterior_steps: int = 1
) -> int:
    """The paper's accounting, per sample: what `Cost.evaluations` counts, by formula.

    Args:
        method: "gradient" or "controlled" K + 4nK (drift; map and reward, forward and backward); "stein" K + 2nK
            (drift; map and reward); "dps" 4K (the paper's 4NK is that of N chains); "search" 2mnK; "best_of_n"
            nK + n; "smc", of the whole population, m (4K − 2): DPS's 4 in each step but the last, which has no
            guidance; "smc_base" 2mK.
            Steered from a later time on, or with p evaluations of the map in a draw, G of the K evaluations guided:
            K + (2p + 2) n G, K + (p + 1) n G and K + 3G.
        steps: K, evaluations of the drift: the number of steps, times the `EVALUATIONS` of the dynamics in one.
        n: posterior draws per step and sample; of "best_of_n" the candidates.
        m: particles of "search", "smc" and "smc_base" (its base proposal).
        guided: G, of "gradient", "controlled", "stein" and "dps"; K where None.
        posterior_steps: p, of the first three.

    Raises:
        ValueError: counts below one (guided: below zero or above K), or an unknown method.
    """
    for name, count in {"steps": steps, "n": n, "m": m, "posterior_steps": posterior_steps}.items():
        check_count(count, name)
    guided = steps if guided is None else guided
    check_count(guided, "guided", 0)
    if guided > steps:
        raise ValueError(f"guided must be at most steps = {steps}, got {guided}")
    formulas = {
        "gradient": steps + (2 * posterior_steps + 2) * n * guided,
        "controlled": steps + (2 * posterior_steps + 2) * n * guided,
        "stein": steps + (posterior_steps + 1) * n * guided,
        "dps": steps + 3 * guided,
        "search": 2 * m * n * steps,
        "best_of_n": n * steps + n,
        "smc": m * (4 * steps - 2),
        "smc_base": 2 * m * steps,
    }
    if method not in formulas:
        raise ValueError(f"method must be one of {', '.join(formulas)}, got {method!r}")
    return formulas[method]


class CountedMap:
    """A map that adds every row that passes through it, forward and backward, to a `Cost`."""

    def __init__(self, X: MetaFlowMap, cost: Cost):
        self.X, self.cost = X, cost
        self.shape, self.reads_tx, self.dtype, self.device = X.shape, X.reads_tx, X.dtype, X.device

    def __call__(self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
        """X_{s,u}(z; t, x), `(B, *D)`."""
        return self._counted(self.X(s, u, z, t, x, y))

    def velocity(self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
        """v_{s,u}(z; t, x), `(B, *D)`."""
        return self._counted(self.X.velocity(s, u, z, t, x, y))

    def from_tx(self, s: Time, u: Time, z: Tensor, t: Time, tx: Tensor, y: Tensor | None = None) -> Tensor:
        """X_{s,u} with the context given as t·x."""
        return self._counted(self.X.from_tx(s, u, z, t, tx, y))

    def velocity_from_tx(self, s: Time, u: Time, z: Tensor, t: Time, tx: Tensor, y: Tensor | None = None) -> Tensor:
        """v_{s,u} with the context given as t·x."""
        return self._counted(self.X.velocity_from_tx(s, u, z, t, tx, y))

    def _counted(self, result: Tensor) -> Tensor:
        self.cost.map_forward += len(result)
        if result.requires_grad:
            result.register_hook(self._backward)
        return result

    def _backward(self, gradient: Tensor) -> None:
        self.cost.map_backward += len(gradient)


class CountedReward:
    """A reward that counts its rows; one that couples those of a batch is refused, once they differ from each other."""

    def __init__(self, reward: Reward, cost: Cost):
        self.reward, self.cost, self.checked = reward, cost, False

    def __call__(self, x1: Tensor) -> Tensor:
        """r(x₁), `(B, *D) -> (B,)`."""
        r = self.reward(x1)
        if not isinstance(r, Tensor) or r.ndim != 1:
            return r  # `evaluate_reward` says what is wrong with it
        if not self.checked and len(r) == len(x1) > 1 and bool(torch.isfinite(r).all()):
            check_uncoupled(self.reward, x1, r)
            spread = (x1 - x1[:1]).detach().abs().max()
            self.checked = bool(spread > 1e-3 * x1.detach().abs().max())  # of equal rows the check learns nothing
        self.cost.reward_forward += len(r)
        if r.requires_grad:
            r.register_hook(self._backward)
        return r

    def _backward(self, gradient: Tensor) -> None:
        self.cost.reward_backward += len(gradient)


@contextmanager
def counting(X: MetaFlowMap, reward: Reward, samples: int) -> Iterator[tuple[MetaFlowMap, Reward, Cost]]:
    """The same map and reward, counted, and the `Cost` that they fill; its seconds and memory are set at the end.

    They are so too where the run fails.
    """
    cost = Cost(samples)
    cuda = X.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(X.device)
        torch.cuda.reset_peak_memory_stats(X.device)
    began = time.perf_counter()
    try:
        yield CountedMap(X, cost), CountedReward(reward, cost), cost
    finally:
        if cuda:
            torch.cuda.synchronize(X.device)
        cost.seconds = time.perf_counter() - began
        cost.peak_memory = torch.cuda.max_memory_allocated(X.device) if cuda else _peak_of_process()


def _peak_of_process() -> int:
    """Bytes; 0 on systems that do not tell."""
    if sys.platform == "win32":
        return 0
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes on Linux
