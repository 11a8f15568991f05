"""The paper, executable: its table is complete and true, and no row of it passes when its function is wrong."""

import json
import re
import subprocess
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import mfm_ref.verify as command
import mfm_ref.verify_residuals as rows
from mfm_ref import GaussianMixture, regression_loss, velocity_loss
from mfm_ref.estimators import gradient_guidance, stein_guidance, weighted_mean
from mfm_ref.sampling import noise_like
from mfm_ref.verify import Result, find, markdown, table, verify
from mfm_ref.verify_residuals import EQUATIONS, column

ROOT = Path(__file__).parent.parent
BY_NAME = {e.name: e for e in EQUATIONS}
each_row = pytest.mark.parametrize("e", EQUATIONS, ids=[f"E{e.number} {e.name}" for e in EQUATIONS])


@pytest.fixture(scope="session")
def results() -> list[Result]:
    """The table for seed 0, measured once."""
    return verify(0)


# ---- it holds ------------------------------------------------------------------------------------------


def test_every_row_holds(results):
    assert [f"{r.equation.name}: {r.residual}" for r in results if not r.passed] == []


@pytest.mark.slow
def test_every_row_holds_for_another_seed_with_other_numbers(results):
    others = verify(20_260_126)
    assert [f"{r.equation.name}: {r.residual}" for r in others if not r.passed] == []
    same = [a.equation.name for a, b in zip(results, others, strict=True) if a.residual == b.residual]
    assert set(same) <= {"interpolant", "parameterisation"}  # exact, to the last bit


def test_a_seed_gives_the_same_numbers_again():
    for name in ("drift", "two noises"):
        assert BY_NAME[name].residual(3) == BY_NAME[name].residual(3) != BY_NAME[name].residual(4)


# ---- it would not, if a function were wrong ------------------------------------------------------------


def eigen(p, log_weights=None, means=None, eigenvalues=None):
    """A mixture with some of its parts replaced."""
    parts = log_weights, means, None, eigenvalues
    own = p.log_weights, p.means, p.basis, p.eigenvalues
    return GaussianMixture._from_eigen(*(b if a is None else a for a, b in zip(parts, own, strict=True)))


def negative(f):
    return lambda *a, **k: -f(*a, **k)


def times(factor):
    return lambda f: lambda *a, **k: factor * f(*a, **k)


def at_other_end(f):
    """A conversion with 1−t for t."""
    return lambda a, t, x: f(a, 1 - t, x)


def one_noise(f):
    """The context and the auxiliary path with the same noise."""

    def wrong(x1, s, t, generator):
        x, _, _ = f(x1, t, t, generator=generator)
        x0 = (x - column(t) * x1) / (1 - column(t))
        return x, (1 - column(s)) * x0 + column(s) * x1, x1 - x0

    return wrong


def velocity_of_the_context(f):
    """x₁ − x₀ in the place of x₁ − x̄₀."""

    def wrong(x1, s, t, generator):
        x, z, _ = f(x1, s, t, generator=generator)
        return x, z, (x1 - x) / (1 - column(t) + column(t == 1))

    return wrong


def euler(self, s, u, z, t, x, y=None):
    return z + column(u - s) * rows.ExactFlowMap.velocity(self, s, s, z, t, x)


class Backwards(rows.FlowMap):
    def forward(self, s, u, z, t, x, y=None, guidance=None):
        return 2 * z - super().forward(s, u, z, t, x, y, guidance)


class ByTheDrift(rows.FlowMap):
    def forward(self, s, u, z, t, x, y=None, guidance=None):
        return z + column(u - s) * self.velocity(s, s, z, t, x)


class FromZero(rows.FlowMap):
    def forward(self, s, u, z, t, x, y=None, guidance=None):
        return z + column(u) * self.velocity(s, u, z, t, x)


def without_the_first_leg(X, s, w, u, z, t, x, drift=None):
    return 0.01 * X.velocity(s, w, z, t, x) + 0.99 * X.velocity(w, u, z, t, x)


def legs_weighted_the_other_way(X, s, w, u, z, t, x, drift=None):
    return 0.99 * X.velocity(s, w, z, t, x) + 0.01 * X.velocity(w, u, X(s, w, z, t, x), t, x)


def without_a_target(X, *a, drift=None):
    *_, s, u, z, t, x = a
    return X.velocity(s, u, z, t, x).square().mean()


def mean_reward(X, r, t, x, n, eps):
    draws = rows.sample_posterior(X, t, x, n, eps=eps)
    return r(draws.flatten(0, 1)).unflatten(0, draws.shape[:2]).mean(0)


def renoised_the_other_way(X, n, steps, generator):
    x = noise_like(X, n, generator=generator)
    for t, after in pairwise(rows.time_grid(steps)):
        x1 = rows.sample_posterior(X, t, x, 1, generator=generator)[0]
        x = after * x1 + after * noise_like(X, n, generator=generator)
    return x


def means_of_posteriors(X, n, steps, generator):
    x = noise_like(X, n, generator=generator)
    for t, after in pairwise(rows.time_grid(steps)):
        x = rows.interpolate(noise_like(X, n, generator=generator), X.p1.denoiser(t, x), after)
    return x


def with_partition(change):
    def wrong(f):
        def smc(*a, **k):
            found, cost = f(*a, **k)
            found.log_partition = change(found.log_partition)
            return found, cost

        return smc

    return wrong


MUTATIONS = [  # row, what is replaced (in verify_residuals, or by its whole name), what it becomes
    ("interpolant", "interpolate", lambda f: lambda x0, x1, t: f(x1, x0, t)),
    ("interpolant", "interpolate", lambda f: lambda x0, x1, t: (1 - t) * x0 + t * x1),  # times follow the features
    ("drift", "GaussianMixture.drift", negative),
    ("drift", "GaussianMixture.drift", lambda f: GaussianMixture.denoiser),
    ("drift", "GaussianMixture.drift", lambda f: lambda p, t, x: f(p, 1 - t, x)),
    ("conversions", "drift_to_denoiser", at_other_end),
    ("conversions", "drift_to_score", negative),
    ("conversions", "denoiser_to_drift", at_other_end),
    ("conversions", "denoiser_to_score", lambda f: lambda D, t, x: (1 - column(t)) * f(D, t, x)),
    ("conversions", "score_to_drift", at_other_end),
    ("conversions", "score_to_denoiser", at_other_end),
    ("sampling", "integrate", lambda f: lambda b, *a, **k: f(lambda t, x: b(1 - t, x), *a, **k)),
    ("sampling", "integrate", lambda f: lambda b, *a, **k: f(lambda t, x: -b(t, x), *a, **k)),
    (
        "posterior",
        "GaussianMixture.posterior",
        lambda f: lambda p, t, x: eigen(q := f(p, t, x), eigenvalues=2 * q.eigenvalues),
    ),
    (
        "posterior",
        "GaussianMixture.posterior",
        lambda f: lambda p, t, x: eigen(q := f(p, t, x), p.log_weights.expand_as(q.log_weights)),
    ),
    ("tilted law", "GaussianMixture.tilt", lambda f: lambda p, r: eigen(f(p, r), p.log_weights)),
    ("tilted law", "GaussianMixture.tilt", lambda f: lambda p, r: eigen(p, f(p, r).log_weights)),
    ("value", "GaussianMixture.value", negative),
    ("value", "GaussianMixture.value", lambda f: lambda p, r, t, x: r(p.denoiser(t, x))),  # Jensen's inequality
    ("noise scale", "noise_scale", times(0.5)),
    ("noise scale", "noise_scale", lambda f: lambda t: 2 * t / (1 - t + (t == 1))),
    ("SDE step", "sde_transition", lambda f: lambda *a: (*f(*a)[:2], f(*a)[2] ** 2)),
    ("SDE step", "sde_transition", lambda f: lambda *a: (1 - f(*a)[1], *f(*a)[1:])),
    ("Doob ODE", "noise_scale", times(2)),
    ("Doob ODE", "GaussianMixture.value", negative),
    ("Doob ODE", "GaussianMixture.tilt", lambda f: lambda p, r: eigen(p, f(p, r).log_weights)),
    ("Doob ODE from draws", "mfm_ref.alignment.guidance", negative),
    ("Doob ODE from draws", "mfm_ref.alignment.guidance", times(2)),
    ("Doob ODE from draws", "doob_drift", lambda f: lambda *a, **k: f(*a, **k, rescale=True)),
    ("Doob SDE", "mfm_ref.sampling.sde_transition", lambda f: lambda *a: (*f(*a)[:2], f(*a)[2] / 2**0.5)),
    ("Doob SDE", "steer", lambda f: lambda *a, **k: f(*a, **k, rescale=True)),
    ("Doob SDE", "steer", lambda f: lambda X, r, *a, **k: f(X, lambda x1: r(x1) / 2, *a, **k)),
    ("auxiliary path", "coupled_interpolants", lambda f: lambda x1, s, t, generator: f(x1, t, s, generator=generator)),
    ("auxiliary path", "coupled_interpolants", velocity_of_the_context),
    ("two noises", "coupled_interpolants", one_noise),
    ("two noises", "coupled_interpolants", lambda f: lambda x1, s, t, generator: f(x1, t, s, generator=generator)),
    ("conditional drift", "ExactFlowMap.velocity", lambda f: lambda X, s, u, z, t, x: f(X, t, t, x, s, z)),
    ("conditional drift", "ExactFlowMap.velocity", lambda f: lambda X, s, u, z, t, x: f(X, s, u, z, 0 * t, x)),
    ("Meta Flow Map", "ExactFlowMap.__call__", lambda f: euler),
    ("Meta Flow Map", "ExactFlowMap.__call__", lambda f: lambda X, s, u, z, t, x: f(X, s, u, z, 0 * t, x)),
    ("one-step draws", "sample_posterior", lambda f: lambda X, t, x, n, eps: f(X, 0 * t, x, n, eps=eps)),
    ("one-step draws", "sample_posterior", lambda f: lambda X, t, x, n, eps: f(X, t, x, n, eps=-eps)),
    ("parameterisation", "FlowMap", lambda f: Backwards),
    ("parameterisation", "FlowMap", lambda f: FromZero),
    ("parameterisation", "FlowMap", lambda f: ByTheDrift),
    ("GLASS", "glass_drift", lambda f: lambda b, s, z, t, x: f(b, t, x, s, z)),
    ("GLASS", "glass_drift", lambda f: lambda b, s, z, t, x: f(b, s, z, 0 * t, x)),
    ("diagonal, teacher", "diagonal_loss", lambda f: lambda X, s, z, t, x, v: f(X, t, x, s, z, v)),
    ("diagonal, teacher", "diagonal_loss", lambda f: lambda X, s, z, t, x, v: f(X, s, z, t, x, -v)),
    ("diagonal, data", "diagonal_loss", lambda f: lambda X, s, z, t, x, v: f(X, t, x, s, z, v)),
    ("diagonal, data", "coupled_interpolants", velocity_of_the_context),
    ("semigroup", "semigroup_target", lambda f: without_the_first_leg),
    ("semigroup", "semigroup_target", lambda f: legs_weighted_the_other_way),
    ("semigroup", "semigroup_loss", lambda f: without_a_target),
    (  # the term with ∂_u left out
        "Lagrangian",
        "lagrangian_target",
        lambda f: lambda X, s, u, z, t, x, drift=None: X.velocity(u, u, X(s, u, z, t, x), t, x),
    ),
    ("Lagrangian", "lagrangian_loss", lambda f: without_a_target),
    ("Eulerian", "eulerian_target", lambda f: lambda X, s, u, z, t, x, drift=None: X.velocity(s, s, z, t, x)),
    (  # the derivative with the other sign
        "Eulerian",
        "eulerian_target",
        lambda f: lambda X, s, u, *a, **k: 2 * X.velocity(s, s, *a) - f(X, s, u, *a, **k),
    ),
    ("Eulerian", "eulerian_loss", lambda f: without_a_target),
    ("mean flow", "mean_flow_loss", lambda f: velocity_loss),  # the term with ∂_s left out
    ("mean flow", "mean_flow_loss", lambda f: lambda *a: f(*a[:-1], -a[-1])),
    ("mean flow", "mfm_ref.objectives.mean_flow_target", lambda f: lambda *a: 2 * a[6] - f(*a)),
    ("value from draws", "value", lambda f: mean_reward),
    ("value from draws", "value", lambda f: lambda X, r, t, x, n, eps: f(X, r, t, x, n, eps=eps).exp()),
    ("gradient estimator", "value_gradient", lambda f: lambda X, r, t, x, *a, **k: f(X, r, t, x, *a, **k) * (2 - t[0])),
    ("gradient estimator", "mfm_ref.alignment.gradient_guidance", lambda f: lambda r, pulls: pulls.mean(0)),
    ("its limit", "mfm_ref.alignment.gradient_guidance", lambda f: lambda r, pulls: pulls.mean(0)),
    ("its limit", "mfm_ref.alignment.guidance_factor", lambda f: lambda X, t, x: column(t)),
    (  # E[x₁] left out
        "gradient-free estimator",
        "mfm_ref.alignment.stein_guidance",
        lambda f: lambda r, draws, t: weighted_mean(r, draws) / (1 - column(t)),
    ),
    (
        "gradient-free estimator",
        "mfm_ref.alignment.stein_guidance",
        lambda f: lambda r, draws, t: f(r, draws, t) / (1 - column(t)),
    ),
    (
        "with E16, the default",
        "mfm_ref.alignment.controlled_guidance",
        lambda f: lambda r, draws, pulls, t: gradient_guidance(r, pulls) + stein_guidance(r, draws, t),
    ),
    (
        "with E16, the default",
        "mfm_ref.alignment.controlled_guidance",
        lambda f: lambda r, draws, pulls, t: f(0 * r, draws, pulls, t),
    ),
    ("fine-tuning", "finetune_loss", lambda f: regression_loss),  # e^r left out, or divided by its mean
    ("fine-tuning", "finetune_loss", lambda f: lambda *a, **k: f(*a, **k, gain=lambda t: 2 + 0 * t)),
    ("fine-tuning, Stein", "finetune_loss", lambda f: regression_loss),
    (
        "fine-tuning, Stein",
        "finetune_loss",
        lambda f: lambda student, b, X, r, t, x, **k: f(student, b, X, r, 1 - (t + (t == 0)), x, **k),
    ),
    ("few-step sampler", "sample", lambda f: renoised_the_other_way),
    ("few-step sampler", "sample", lambda f: means_of_posteriors),
    ("DPS", "dps_drift", lambda f: lambda X, r, t, x: 2 * X.drift(t, x) - f(X, r, t, x)),
    ("DPS", "mfm_ref.alignment.guidance_factor", lambda f: lambda X, t, x: column(t)),
    ("Best-of-N", "best_of_n", lambda f: lambda X, r, size, n, **k: f(X, r, size, n - 1, **k)),
    ("Best-of-N", "best_of_n", lambda f: lambda X, r, *a, **k: f(X, lambda x1: -r(x1), *a, **k)),
    ("SMC (TDS)", "smc", with_partition(lambda total: 0.0)),
    ("SMC (TDS)", "smc", with_partition(lambda total: -total)),
    ("SMC (TDS)", "mfm_ref.baselines.log_transition_ratio", negative),
    ("GLASS rollout", "glass_rollout", lambda f: lambda b, t, x, n, steps, eps: f(b, 1 - t, x, n, steps, eps=eps)),
    ("GLASS rollout", "glass_rollout", lambda f: lambda b, t, x, n, steps, eps: f(b, t, x, n, 1, eps=eps)),
    ("SDE rollout", "mfm_ref.baselines.sde_transition", lambda f: lambda *a: (*f(*a)[:2], f(*a)[2] / 2**0.5)),
    ("SDE rollout", "sde_rollout", lambda f: lambda b, t, x, n, steps, generator: f(b, 0 * t, x, n, steps)),
    ("MFM-Search", "search", lambda f: lambda *a, **k: f(*a, **k, select="particle")),
    ("MFM-Search", "search", lambda f: lambda X, r, *a, **k: f(X, lambda x1: -r(x1), *a, **k)),
    ("MFM-Search", "search", lambda f: lambda *a, particles, **k: f(*a, particles=1, **k)),
    ("MFM-Search", "mfm_ref.search.interpolate", lambda f: lambda x0, x1, t: f(x1, x0, t)),
]


def each_mutation():
    """The first of each row; the others are slow tests."""
    seen: set[str] = set()
    for k, mutation in enumerate(MUTATIONS):
        name = mutation[0]
        yield pytest.param(*mutation, id=f"{name}-{k}", marks=pytest.mark.slow if name in seen else ())
        seen.add(name)


@pytest.mark.parametrize(("name", "target", "wrong"), list(each_mutation()))
def test_a_wrong_function_fails_its_row(name, target, wrong, monkeypatch):
    """Finite residuals, so that it is not an error on the way that fails, and the first one beyond the tolerance."""
    e = BY_NAME[name]
    *path, attribute = target.split(".")
    owner = rows
    if path[:1] == ["mfm_ref"]:
        owner = sys.modules[".".join(path)]
    else:
        for part in path:
            owner = getattr(owner, part)
    monkeypatch.setattr(owner, attribute, wrong(getattr(owner, attribute)))
    found = []
    for residual in e.residuals(torch.Generator().manual_seed(0)):
        found.append(residual)
        if not residual <= e.tolerance:
            break
    assert found[-1] > 1.2 * e.tolerance, found


def test_every_row_has_a_mutation():
    assert {name for name, *_ in MUTATIONS} == set(BY_NAME)


def test_a_residual_that_is_not_a_number_fails():
    results = [Result(EQUATIONS[0], value) for value in (0.0, float("nan"), float("inf"))]
    assert [r.passed for r in results] == [True, False, False]


# ---- what it shows -------------------------------------------------------------------------------------


def test_every_equation_has_a_row_and_rows_come_in_order():
    numbers = [e.number for e in EQUATIONS]
    assert set(numbers) == set(range(1, 22))
    assert numbers == sorted(numbers)
    assert len(BY_NAME) == len(EQUATIONS)


@each_row
def test_functions_are_there_and_cite_the_equation(e):
    """By its number, also within a range such as E15–E17."""
    for name in e.functions:
        cited = set()
        for first, last in re.findall(r"\bE(\d+)(?:[–-]E(\d+))?", find(name).__doc__ or ""):
            cited |= set(range(int(first), int(last or first) + 1))
        assert e.number in cited, f"the docstring of {name} does not cite E{e.number}"
        assert (ROOT / command.source(name)).exists()


@each_row
def test_the_test_of_a_row_is_there(e):
    path, name = e.test.split("::")
    assert f"\ndef {name}(" in (ROOT / path).read_text()


@each_row
def test_the_tutorial_of_a_row_has_the_equation_in_its_table(e):
    cells = json.loads((ROOT / command.TUTORIALS[e.tutorial]).read_text())["cells"]
    _, where = "\n".join("".join(cell["source"]) for cell in cells).split("## Where it is")
    assert re.search(rf"^\| E{e.number} \|", where, re.MULTILINE), f"no row | E{e.number} | in tutorial {e.tutorial}"


def test_the_table_fits_a_terminal_and_has_every_row(results):
    lines = table(results).splitlines()
    # A bar over a letter is a character of its own, and takes no column.
    widths = [sum(not unicodedata.combining(c) for c in line) for line in lines]
    assert 100 <= max(widths) <= 160
    text = " ".join(" ".join(lines).split())
    for r in results:
        e = r.equation
        assert f"E{e.number} {e.name} {e.formula} {r.shown} {r.limit} pass {', '.join(e.functions)}" in text
        assert f"· {e.test} · tutorial {e.tutorial}" in text
    verdicts = {
        sum(not unicodedata.combining(c) for c in line.split("  pass")[0]) for line in lines if "  pass" in line
    }
    assert len(verdicts) == 1  # one column
    assert f"{len(results)} rows for 21 equations. All hold." in text


def test_a_row_that_fails_is_named(results):
    wrong = [*results[:2], Result(BY_NAME["posterior"], 0.5)]
    assert re.search(r"5\.0e-01 +≤ 1e-09 +FAIL\n", table(wrong)) and "FAIL: E3 posterior." in table(wrong)
    assert markdown(wrong).splitlines()[-1].endswith("| 5.0e-01 | ≤ 1e-09 | FAIL |")


def cells_of(line: str) -> list[str]:
    """The cells of a row of a Markdown table; an escaped bar is none of its borders."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_the_markdown_is_a_table_whose_links_lead_somewhere(results):
    head, rule, *lines = markdown(results).splitlines()
    assert set(rule) == set("|-") and len(lines) == len(results)
    assert {len(cells_of(line)) for line in (head, rule, *lines)} == {8}
    for line, r in zip(lines, results, strict=True):
        links = re.findall(r"\[([^]]+)\]\(([^)]+)\)", line)
        assert [text for text, _ in links[: len(r.equation.functions)]] == [
            f"`{name}`" for name in r.equation.functions
        ]
        assert len(links) == len(r.equation.functions) + 2
        for _, link in links[:-1]:
            assert (ROOT / link).exists(), link
        assert links[-1][1] == command.TUTORIALS[r.equation.tutorial]


def test_text_is_escaped_in_markdown():
    assert command.escaped("p*(x | y) < 1") == r"p\*(x \| y) &lt; 1"
    assert len(cells_of(f"| {command.escaped('a | b')} | c |")) == 2


def test_the_readme_has_the_table(results):
    """But for the residuals, which differ between machines; those printed there are within the tolerances."""
    block = (ROOT / "README.md").read_text().split("<!-- verify -->")[1].split("<!-- /verify -->")[0]
    shown, now = ([cells_of(line) for line in text.strip().splitlines()] for text in (block, markdown(results)))
    assert [row[:5] + row[6:] for row in shown] == [row[:5] + row[6:] for row in now], "run verify --markdown and copy"
    for row, r in zip(shown[2:], results, strict=True):
        assert float(row[5]) <= r.equation.tolerance


# ---- the command ---------------------------------------------------------------------------------------


def test_the_command_line(monkeypatch, capsys):
    """Options reach `verify`, and the exit code says whether all rows hold."""
    seeds, residual = [], 0.0

    def measured(seed):
        seeds.append(seed)
        return [Result(BY_NAME["GLASS"], residual)]

    monkeypatch.setattr(command, "verify", measured)
    assert command.main([]) == 0
    assert "GLASS" in (text := capsys.readouterr().out) and not text.startswith("|")
    assert command.main(["--seed", "7", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| | equation |")
    residual = 1.0
    assert command.main(["--markdown"]) == 1
    assert seeds == [0, 7, 0]


@pytest.mark.parametrize("seed", ["-1", "1.5", "seven", ""])
def test_a_bad_seed_is_refused(seed, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--seed", seed])
    assert stopped.value.code == 2
    assert "argument --seed: " in capsys.readouterr().err


def test_verify_refuses_a_bad_seed_and_leaves_the_threads_alone():
    with pytest.raises(ValueError, match="seed must be an integer >= 0, got -1"):
        verify(-1)
    threads = torch.get_num_threads()
    assert len(verify(1, EQUATIONS[:1])) == 1
    assert torch.get_num_threads() == threads


def test_the_module_runs_elsewhere_and_needs_no_tests(tmp_path):
    """As a user starts it, in a folder without a clone around it: here as far as the first message."""
    ran = subprocess.run(
        [sys.executable, "-m", "mfm_ref.verify", "--seed", "x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 2 and "must be an integer >= 0, got 'x'" in ran.stderr
    for name in ("verify", "verify_residuals"):
        assert not re.search(
            r"^\s*(from|import) (tests|toy|imagenet|benchmarks)", (ROOT / "mfm_ref" / f"{name}.py").read_text(), re.M
        )


@pytest.mark.slow
def test_the_whole_command_takes_less_than_a_minute(tmp_path):
    code = "import time; from mfm_ref.verify import main; code = main([]); print(time.process_time()); exit(code)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert float(ran.stdout.split()[-1]) < 60
