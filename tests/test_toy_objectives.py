"""The comparison of objectives: its plan, single trainings of it, its tables and pictures; the problems it uses."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mfm_ref import ExactFlowMap, GaussianMixture
from mfm_ref.files import save_json
from toy import table
from toy.comparison import TIMES, posterior_ratio, rollout, semigroup_residual
from toy.objectives import DIMENSIONS, FAST, OBJECTIVES, STAGES, Job, ObjectivesConfig, jobs_of, main, run
from toy.objectives_figures import draw_objectives, draw_others
from toy.problems import SHAPES, mixture_in, problem
from toy.table import RESULTS

SECONDS = {name: 0.01 * (k + 1) for k, name in enumerate([*OBJECTIVES, *STAGES])}


def fast(tmp_path: Path) -> ObjectivesConfig:
    return dataclasses.replace(ObjectivesConfig(out=tmp_path), **FAST)


def p1() -> GaussianMixture:
    return problem("mixture").mixture


# ---- the plan ------------------------------------------------------------------------------------------


def test_every_objective_gets_its_seconds_or_its_steps():
    """Steps × seconds per step of the objective and of the stage before it are the budget, to one step of each."""
    config = ObjectivesConfig()
    *_, diagonals, rest = jobs_of(config, SECONDS)
    for job in rest:
        source = OBJECTIVES[job.objective].source
        stage = "diagonal from data" if source == "data" else "diagonal from a drift"
        (before,) = (a for a in diagonals if dataclasses.replace(job, objective=stage, steps=a.steps) == a)
        if job.budget == "time":
            spent = before.steps * SECONDS[stage] + job.steps * SECONDS[job.objective]
            assert 0 <= spent - config.seconds < SECONDS[stage] + SECONDS[job.objective]
        else:
            total = config.equal_steps if job.problem == "mixture" else config.other_steps
            assert 0 <= before.steps + job.steps - total < 2
    problems = ["mixture", *SHAPES, *DIMENSIONS]
    plan = {(name, "time" if k == 0 else "steps") for k, name in enumerate(["mixture", *problems])}
    assert {(a.problem, a.budget) for a in rest} == plan
    for name, budget in plan:
        ran = sorted((a.objective, a.seed) for a in rest if (a.problem, a.budget) == (name, budget))
        seeds = {o: 1 if name != "mixture" or what.source == "data" else 3 for o, what in OBJECTIVES.items()}
        assert ran == sorted((objective, seed) for objective, n in seeds.items() for seed in range(n))


def test_folders_of_jobs_differ():
    jobs = [job for part in jobs_of(ObjectivesConfig(), SECONDS) for job in part]
    assert len({job.folder for job in jobs}) == len(jobs)


# ---- single trainings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        ("Eulerian, self", "mixture"),
        ("mean flow, data", "mixture"),
        ("Eulerian, self", "moons"),
        ("mean flow, data", "moons"),
        ("Eulerian, self", "mixture-8"),
        pytest.param("mean flow, data", "mixture-8", marks=pytest.mark.slow),
    ],
)
def test_a_job_follows_its_stages_and_is_not_run_twice(tmp_path, name, objective):
    config = fast(tmp_path)
    jobs = {stage: Job(config, name, stage, 0, "steps", 3) for stage in STAGES}
    for stage in STAGES if name in SHAPES else list(STAGES)[1:]:
        run(jobs[stage])
    job = Job(config, name, objective, 0, "steps", 5)
    result = run(job)
    assert result["steps"] == 5
    assert list(result["ratio"]) == list(result["semigroup"]) == [str(t) for t in TIMES]
    assert ("error" in result) == (name == "mixture-8")
    written = {path: path.stat().st_mtime_ns for path in job.folder.rglob("*")}
    assert run(job) == result
    assert {path: path.stat().st_mtime_ns for path in job.folder.rglob("*")} == written
    assert not (job.folder / "training").exists()
    with pytest.raises(ValueError, match="other settings"):
        run(dataclasses.replace(job, steps=6))


def test_objectives_of_a_seed_share_their_first_weights(tmp_path):
    from toy.objectives import untrained

    jobs = [Job(fast(tmp_path), "mixture", name, seed, "steps", 3) for name in list(OBJECTIVES)[:2] for seed in (0, 1)]
    first, other, same, _ = (untrained(job).state_dict()["network.inlet.weight"] for job in jobs)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("change", [{"device": "cuda"}, {"threads": 2}])
def test_options_that_would_spoil_the_times_are_refused(tmp_path, change):
    with pytest.raises(ValueError, match="one core of a CPU"):
        main(dataclasses.replace(fast(tmp_path), **change))


def _saved_and_gone(folder: Path, workers: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in workers) and any(folder.glob("jobs/*/training/step-*"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the children of a process from Linux's /proc")
@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_trainings_save_and_end_with_the_process_that_started_them(tmp_path, sent):
    """Whichever way that ends: those under way leave a checkpoint, and nothing runs on."""
    config = dataclasses.replace(fast(tmp_path), seconds=1e5, jobs=2)
    save_json(
        {"settings": "batch 64", **dict.fromkeys((*OBJECTIVES, *STAGES), 1.0)}, tmp_path / "seconds_per_step.json"
    )
    code = f"from pathlib import PosixPath\nfrom toy.objectives import *\nif __name__ == '__main__': main({config!r})"
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, script], stderr=log, env=environment)
    try:
        _until(lambda: any(tmp_path.glob("jobs/mixture-diagonal-*-time/training")), process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(pid) for pid in children]
    finally:
        process.send_signal(sent)
        process.wait()
    assert len(workers) >= 2
    _until(lambda: _saved_and_gone(tmp_path, workers))


def _until(condition, process=None) -> None:
    """Wait for a condition, a minute at most, and no longer than a process runs."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come within a minute"
        assert process is None or process.poll() is None, "the process ended"
        time.sleep(0.05)


@pytest.mark.slow
def test_the_whole_command_in_its_fast_form(tmp_path):
    report = main(ObjectivesConfig(out=tmp_path, fast=True))
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "objectives.png").stat().st_size > 10_000
    assert (tmp_path / "others.png").stat().st_size > 10_000


# ---- the committed result ------------------------------------------------------------------------------


def test_tables_and_pictures_are_made_of_a_report(tmp_path):
    report = json.loads((RESULTS / "objectives.json").read_text())
    tables = table.objectives_tables(report)
    assert all(f"| {name} |" in tables for name in OBJECTIVES)
    draw_objectives(report, tmp_path / "a.png")
    draw_others(report, tmp_path / "b.png")
    assert {path.read_bytes()[:4] for path in tmp_path.iterdir()} == {b"\x89PNG"}


# ---- how maps are compared -----------------------------------------------------------------------------


def test_ratio_of_the_oracle_is_one_and_of_a_wrong_map_is_not():
    """Two exact sets are as far apart as two others; 0.4 is for 8 contexts of 200 samples."""
    law, rng = p1(), torch.Generator().manual_seed(0)

    def ratio(X):
        return posterior_ratio(
            X,
            lambda t, n: law.marginal(t).sample(n, generator=rng),
            lambda t, x, n: law.posterior(t, x).sample(n, generator=rng),
            n_contexts=8,
            n_samples=200,
            generator=rng,
            times=(0.4,),
        )

    assert all(value == pytest.approx(1, abs=0.4) for value in ratio(ExactFlowMap(law, max_step=0.5)).values())
    other = ExactFlowMap(GaussianMixture(law.weights, 1.5 * law.means, law.covs))
    assert all(value > 1.8 for value in ratio(other).values())


def test_semigroup_residual_is_zero_for_a_flow_and_not_for_one_euler_step():
    law = mixture_in(2)
    X, rng = ExactFlowMap(law, max_step=0.5), torch.Generator().manual_seed(0)

    class Euler(ExactFlowMap):
        def __call__(self, s, u, z, t, x, y=None):
            jump = (torch.as_tensor(u) - torch.as_tensor(s)).reshape(-1, 1)
            return z + jump * X.velocity(s, s, z, t, x)

    def residual(X):
        return semigroup_residual(
            X, lambda t, n: law.marginal(t).sample(n, generator=rng), data_var=4.0, n=10, generator=rng
        )

    assert max(residual(X).values()) < 1e-3  # float32
    assert min(residual(Euler(law)).values()) > 0.01


def test_a_rollout_is_the_flow_to_fourth_order():
    """RK4 in steps even in the angle, against the oracle: halving the step divides the error by 16 (here 10 to 30)."""
    law = mixture_in(2).to(torch.float64)
    x, eps = law.marginal(0.4).sample(5, generator=torch.Generator().manual_seed(0)), torch.randn(7, 5, 2).double()
    exact = ExactFlowMap(law)(0.0, 1.0, eps.flatten(0, 1), 0.4, x.repeat(7, 1)).unflatten(0, (7, 5))
    errors = [
        float((rollout(law.drift, 0.4, x, 7, steps=n, data_var=4.0, eps=eps) - exact).square().mean().sqrt())
        for n in (40, 80)
    ]
    assert errors[1] < 1e-4
    assert 10 < errors[0] / errors[1] < 30


# ---- problems ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SHAPES, "mixture", "mixture-2", "mixture-8"])
def test_moments_of_a_problem_are_those_of_its_samples(name):
    law = problem(name)
    x = law.sample(100_000, torch.Generator().manual_seed(1))
    assert torch.allclose(x.mean(0), law.mean, atol=0.06)
    assert torch.allclose(x.T.cov(), law.cov, atol=0.12)


def test_checkerboard_fills_every_other_square():
    x = problem("checkerboard").sample(20_000, torch.Generator().manual_seed(0))
    assert float(x.abs().max()) <= 4
    squares, counts = torch.div(x, 2, rounding_mode="floor").int().unique(dim=0, return_counts=True)
    assert len(squares) == 8
    assert (squares.sum(1) % 2 == squares[0].sum() % 2).all()
    assert (counts - 2500).abs().max() < 5 * math.sqrt(2500)


def test_means_are_six_apart_in_every_dimension():
    """Mean square 36 over many draws of the places; five of them vary, by a factor of two in two dimensions."""
    for dim in (8, 32):
        means = mixture_in(dim).means
        squares = torch.cdist(means, means).square()[~torch.eye(5, dtype=torch.bool)]
        assert 20 < float(squares.mean()) < 60


def test_posterior_of_a_shape_is_a_rollout():
    law = problem("moons")
    drift, g = p1().drift, torch.Generator().manual_seed(0)
    samples = law.posterior(drift, g, 4)(0.5, torch.zeros(3, 2), 6)
    assert samples.shape == (6, 3, 2)
