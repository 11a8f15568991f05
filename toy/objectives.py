"""Every objective of E14 side by side: equal networks, equal time, equal steps; then shapes, then dimensions.

    python -m toy.objectives --out runs/objectives

Each objective starts from the same diagonal (E13), trained for a part of its budget, and goes on with half of each
batch for the consistency. Writes report.json, objectives.png and others.png. Finished trainings are kept in out/jobs
and an unfinished one goes on from its last checkpoint, so that a run that was killed can be started again.
"""

import dataclasses
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mfm_ref import MLP, ExactFlowMap, FlowMap, meta_flow_map_loss, train
from mfm_ref.data import RandomBatches
from mfm_ref.files import save_json
from mfm_ref.flow_map import unconditional_drift
from mfm_ref.interpolant import Drift
from mfm_ref.recipe import no_context
from mfm_ref.run_state import TrainConfig
from mfm_ref.times import context_time
from toy.common import ToyConfig, option, parse, read_result, set_up_processor
from toy.comparison import TIMES, posterior_ratio, semigroup_residual
from toy.objectives_figures import draw_objectives, draw_others
from toy.problems import SHAPES, Problem, problem


@dataclasses.dataclass(frozen=True)
class ObjectivesConfig(ToyConfig):
    """Settings of the comparison; the defaults take about an hour and a half of two cores."""

    out: Path = Path("runs/objectives")
    seeds: int = option(3, "trainings of each objective on the paper's mixture; of those from data alone there is one")
    other_seeds: int = option(1, "trainings of each objective on the shapes and in each dimension")
    seconds: float = option(240.0, "of one core for each of them, by its measured time per step")
    equal_steps: int = option(2000, "of each objective in the comparison by steps")
    other_steps: int = option(2000, "of each objective on the shapes and in each dimension")
    diagonal_share: float = option(0.15, "of each budget, for the diagonal alone")
    batch: int = 1024
    lr: float = 4e-3
    contexts: int = option(24, "per time, for the posterior ratio")
    posterior_samples: int = option(4096, "per context")
    other_contexts: int = option(12, "the same on the shapes and in each dimension")
    other_samples: int = option(1024, "likewise")
    rollout_steps: int = option(20, "Runge–Kutta steps, of four evaluations each, of a reference rollout")
    jobs: int = option(2, "trainings at once, each on its own core")


FAST: dict[str, Any] = {
    "seeds": 1, "other_seeds": 1, "seconds": 0.3, "equal_steps": 8, "other_steps": 8, "batch": 64, "contexts": 2,
    "posterior_samples": 64, "other_contexts": 2, "other_samples": 64, "rollout_steps": 2, "jobs": 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Objective:
    """One row of the comparison: arguments of `meta_flow_map_loss`."""

    consistency: str | None
    source: str  # of what v_{s,s} is: "teacher" (E12 in both terms), "self" (E12 in the diagonal only), "data"
    weight: float = 1.0

    @property
    def noisy(self) -> bool:
        """Whether the target of the consistency is made from data."""
        return self.consistency == "mean_flow"


OBJECTIVES = {
    "semigroup, teacher": Objective("semigroup", "teacher"),
    "Lagrangian, teacher": Objective("lagrangian", "teacher", 0.2),
    "Eulerian, teacher": Objective("eulerian", "teacher", 0.2),
    "semigroup, self": Objective("semigroup", "self"),
    "shortcut, self": Objective("shortcut", "self"),
    "Lagrangian, self": Objective("lagrangian", "self", 0.2),
    "Eulerian, self": Objective("eulerian", "self", 0.2),
    "mean flow, self": Objective("mean_flow", "self", 0.2),
    "semigroup, data": Objective("semigroup", "data"),
    "mean flow, data": Objective("mean_flow", "data", 0.2),
}
DIMENSIONS = ("mixture-2", "mixture-8", "mixture-32")


@dataclasses.dataclass(frozen=True)
class Job:
    """One training. `objective` "diagonal from a drift" and "diagonal from data" are the stages before."""

    config: ObjectivesConfig
    problem: str
    objective: str
    seed: int
    budget: str  # "time" or "steps": which diagonal stage to start from
    steps: int

    @property
    def folder(self) -> Path:
        """Of its checkpoints, its weights and its result."""
        name = f"{self.problem}-{self.objective}-{self.seed}-{self.budget}".replace(",", "").replace(" ", "-")
        return self.config.out / "jobs" / name

    @property
    def settings(self) -> str:
        """All that its numbers depend on: not which other trainings there are."""
        numbers = dataclasses.replace(self.config, out=Path(), jobs=1, seed=0, seeds=1, other_seeds=1)
        return repr(dataclasses.replace(self, config=numbers))

    @property
    def result(self) -> dict[str, Any] | None:
        """What `run` left, or None. Raises ValueError for a result of other settings."""
        return read_result(self.folder / "result.json", self.settings)

    @cached_property
    def law(self) -> Problem:
        """The data."""
        return problem(self.problem)


STAGES = {
    "flow matching": Objective(None, "data"),  # at t = 0 only: the drift b that teaches where none is known
    "diagonal from a drift": Objective(None, "teacher"),
    "diagonal from data": Objective(None, "data"),
}


def run(job: Job) -> dict[str, Any]:
    """Train, compare, write result.json; or read it, if the job had ended already."""
    set_up_processor(1)
    if (known := job.result) is not None:
        return known
    began = time.process_time()
    X = train_job(job)
    seconds = time.process_time() - began
    result: dict[str, Any] = {"steps": job.steps, "seconds": seconds}
    if job.objective not in STAGES:
        result |= compare(job, X)
    X.save_pretrained(job.folder / "map")
    save_json({"settings": job.settings, **result}, job.folder / "result.json")
    shutil.rmtree(job.folder / "training")
    return result


def train_job(job: Job, steps: int | None = None) -> FlowMap:
    """The averaged map after `job.steps` updates, or after `steps` of a rehearsal that leaves no files."""
    objective = {**STAGES, **OBJECTIVES}[job.objective]
    X, law = first_map(job) if steps is None else untrained(job), job.law
    drift = teacher(job)
    from_data = objective.source == "data"

    def loss(X: FlowMap, x1: Tensor, generator: torch.Generator | None) -> Tensor:
        return meta_flow_map_loss(
            X,
            x1,
            drift=None if from_data else drift,
            consistency=objective.consistency,
            self_taught=objective.source == "self",
            data_var=law.data_var,
            p=0.0 if from_data else 0.5,
            p_consistency=0.0 if objective.noisy else 0.5,
            consistency_weight=objective.weight,
            generator=generator,
            context=no_context if job.objective == "flow matching" else context_time,
        )

    rng = torch.Generator().manual_seed(1000 * job.seed + 1)
    data = RandomBatches(lambda generator: law.sample(job.config.batch, generator), rng)
    settings = TrainConfig(steps=steps or job.steps, lr=job.config.lr, seed=job.seed, checkpoint_every=1000)
    folder = None if steps else job.folder / "training"
    return train(X, loss, data, settings, folder=folder, tag=job.settings)[0]


def untrained(job: Job) -> FlowMap:
    """The same network for every objective, the same initial weights for every objective of a seed."""
    torch.manual_seed(job.seed)
    return FlowMap(MLP(job.law.mean, job.law.cov, normalise=True))


def first_map(job: Job) -> FlowMap:
    """The map of the stage before."""
    if job.objective in STAGES:
        return untrained(job)
    from_data = OBJECTIVES[job.objective].source == "data"
    stage = "diagonal from data" if from_data else "diagonal from a drift"
    return FlowMap.from_pretrained(dataclasses.replace(job, objective=stage).folder / "map").train()


def teacher(job: Job) -> Drift:
    """b: of the mixture, exactly; of a shape, by flow matching."""
    if job.law.mixture is not None:
        return job.law.mixture.drift
    if job.objective in ("flow matching", "diagonal from data"):
        return lambda t, x: x  # these need none
    flow = FlowMap.from_pretrained(dataclasses.replace(job, objective="flow matching").folder / "map")
    return lambda t, x: unconditional_drift(flow, t, x)


def compare(job: Job, X: FlowMap) -> dict[str, Any]:
    """The posterior ratio, the semigroup residual and, against an oracle, the error of the map itself."""
    config, law = job.config, job.law
    rng = torch.Generator().manual_seed(2)
    n_contexts, n_samples = (
        (config.contexts, config.posterior_samples)
        if job.problem == "mixture"
        else (config.other_contexts, config.other_samples)
    )

    def contexts(t: float, n: int) -> Tensor:
        return law.contexts(t, n, rng)

    found: dict[str, Any] = {
        "ratio": posterior_ratio(
            X,
            contexts,
            law.posterior(teacher(job), rng, config.rollout_steps),
            n_contexts=n_contexts,
            n_samples=n_samples,
            generator=rng,
        ),
        "semigroup": semigroup_residual(X, contexts, data_var=law.data_var, n=n_samples, generator=rng),
    }
    if law.mixture is not None and job.problem != "mixture":
        found["error"] = error_of(X, law, n_samples, rng)
    return found


@torch.no_grad()
def error_of(X: FlowMap, law: Problem, n: int, rng: torch.Generator) -> dict[str, float]:
    """{t: root mean square of X_{0,1}(ε) − the oracle's, over the root mean square spread of the posterior}."""
    assert law.mixture is not None
    oracle, errors = ExactFlowMap(law.mixture), {}
    for t in TIMES:
        x = law.contexts(t, n, rng)
        eps = torch.randn(x.shape, generator=rng)
        apart = X(0.0, 1.0, eps, t, x) - oracle(0.0, 1.0, eps, t, x)
        spread = law.mixture.posterior(t, x).cov.diagonal(dim1=-2, dim2=-1).mean()
        errors[str(t)] = float((apart.square().mean() / spread).sqrt())
    return errors


def measure(config: ObjectivesConfig) -> dict[str, float]:
    """Seconds of one core that a step of each objective and of each stage takes: median of rounds, taken in turn."""
    path, n, rounds = config.out / "seconds_per_step.json", 20, 7
    settings = f"batch {config.batch}"
    if (found := read_result(path, settings)) is not None:
        return found
    names = [*OBJECTIVES, "diagonal from a drift", "diagonal from data"]
    clock: dict[str, list[float]] = {name: [] for name in names}
    for _ in tqdm(range(rounds), desc="time per step", leave=False):
        for name in names:
            job = Job(config, "mixture", name, 0, "time", n)
            began = time.process_time()
            train_job(job, n)
            clock[name].append((time.process_time() - began) / n)
    seconds = {name: statistics.median(values) for name, values in clock.items()}
    save_json({"settings": settings, **seconds}, path)
    return seconds


def jobs_of(config: ObjectivesConfig, seconds: dict[str, float]) -> list[list[Job]]:
    """All trainings, in rounds: a round needs what the one before has left."""
    share = config.diagonal_share
    flows: list[Job] = []
    diagonals: list[Job] = []
    rest: list[Job] = []

    def add(name: str, budget: str, steps: int, seed: int) -> None:
        def updates(objective: str) -> float:
            return config.seconds / seconds[objective] if budget == "time" else steps

        def job(objective: str, n: float) -> Job:
            return Job(config, name, objective, seed, budget, math.ceil(n))

        if name in SHAPES:
            flows.append(job("flow matching", steps))
        for stage in ("diagonal from a drift", "diagonal from data"):
            diagonals.append(job(stage, share * updates(stage)))
        for objective, described in OBJECTIVES.items():
            if seed == config.seed or described.source != "data":
                rest.append(job(objective, (1 - share) * updates(objective)))

    for seed in range(config.seed, config.seed + config.seeds):
        add("mixture", "time", 0, seed)
        add("mixture", "steps", config.equal_steps, seed)
    for seed in range(config.seed, config.seed + config.other_seeds):
        for name in (*SHAPES, *DIMENSIONS):
            add(name, "steps", config.other_steps, seed)
    return [flows, diagonals, rest]


def run_all(config: ObjectivesConfig, rounds: list[list[Job]]) -> None:
    """Every job, `config.jobs` at a time, each in a process of its own."""
    total = sum(map(len, rounds))
    with (
        tqdm(total=total, desc="trainings", disable=None) as bar,
        ProcessPoolExecutor(
            config.jobs, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent
        ) as pool,
    ):
        for jobs in rounds:
            for future in as_completed([pool.submit(run, job) for job in jobs]):
                future.result()
                bar.update()


def end_with_parent() -> None:
    """When the process that started this one is gone, end it by SIGTERM, on which a training saves first."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        while True:  # the pool takes a training's exit for a result, and goes on
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    threading.Thread(target=watch, daemon=True).start()


def main(config: ObjectivesConfig) -> dict[str, Any]:
    """The whole comparison; returns what report.json holds."""
    if (config.device, config.threads) != ("cpu", 1):
        raise ValueError("the comparison is by time on one core of a CPU: leave --device and --threads as they are")
    if config.fast:
        config = dataclasses.replace(config, **FAST)
    set_up_processor(1)
    seconds = measure(config)
    rounds = jobs_of(config, seconds)
    run_all(config, rounds)
    results: dict[str, Any] = {}
    for job in rounds[-1]:
        by_objective = results.setdefault(f"{job.problem}, {job.budget}", {})
        by_objective.setdefault(job.objective, []).append(job.result)
    report = {
        "seconds_per_step": seconds,
        "results": results,
        "core_seconds": sum(found["seconds"] for jobs in rounds for job in jobs if (found := job.result)),
        "config": {k: v if isinstance(v, int | float) else str(v) for k, v in dataclasses.asdict(config).items()},
    }
    save_json(report, config.out / "report.json")
    draw_objectives(report, config.out / "objectives.png")
    draw_others(report, config.out / "others.png")
    return report


if __name__ == "__main__":
    from toy.table import objectives_tables

    print(objectives_tables(main(parse(ObjectivesConfig, __doc__ or ""))))
