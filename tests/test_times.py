"""Laws of the training times, against SciPy's distributions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import logit

from mfm_ref.gaussian import angle_of_time, posterior_std, time_of_angle
from mfm_ref.times import (
    annealed_times,
    balanced_times,
    context_time,
    logit_normal_times,
    ordered_times,
    step_towards,
)
from tests.helpers import LIMIT, z_scores
from tests.strategies import assert_close, rng


def test_context_time_is_the_papers_law():
    """P(t = 0) = 0.1 in standard errors of a binomial (6e-7); the rest has √t uniform, Kolmogorov–Smirnov 1e-6."""
    n = 50_000
    t = context_time(n, generator=rng(0))
    assert t.shape == (n,)
    assert (t >= 0).all()
    assert (t < 1).all()
    zeros = (t == 0).double()
    assert abs(z_scores(zeros, 0.1)) < LIMIT
    assert abs(z_scores(zeros, 0.11)) > LIMIT
    rest = t[t > 0].numpy()
    assert stats.kstest(rest**0.5, "uniform").pvalue > 1e-6
    assert stats.kstest(rest, "uniform").pvalue < 1e-6


@given(st.floats(0, 1), st.floats(0.3, 3))
def test_context_time_options(zero_rate, power):
    t = context_time(4_000, zero_rate=zero_rate, power=power, generator=rng(1))
    spread = math.sqrt(zero_rate * (1 - zero_rate) / 4_000)
    assert abs(float((t == 0).double().mean()) - zero_rate) <= LIMIT * spread + 1e-3
    if (t > 0).sum() > 100:
        assert stats.kstest(t[t > 0].numpy() ** (1 / power), "uniform").pvalue > 1e-6


@given(st.integers(1, 20), st.integers(1, 4))
def test_ordered_times_rise(n, count):
    times = ordered_times(n, count, generator=rng(0))
    assert times.shape == (count, n)
    assert (times.diff(dim=0) >= 0).all()
    assert ((times >= 0) & (times <= 1)).all()


def test_ordered_times_are_those_of_two_uniforms():
    """The smaller of two uniforms has 1 − (1−s)² for its CDF, the larger u²."""
    s, u = ordered_times(20_000, generator=rng(0)).numpy()
    assert stats.kstest(1 - (1 - s) ** 2, "uniform").pvalue > 1e-6
    assert stats.kstest(u**2, "uniform").pvalue > 1e-6
    assert stats.kstest(u, "uniform").pvalue < 1e-6


@given(st.integers(1, 30), st.integers(1, 4), st.floats(-3, 3), st.floats(0.1, 2), st.floats(0, 1))
def test_logit_normal_and_annealed_times_keep_their_ranges(n, count, mean, std, progress):
    times = logit_normal_times(n, count, mean=mean, std=std, generator=rng(0))
    assert times.shape == (count, n)
    assert (times.diff(dim=0) >= 0).all()
    assert ((times >= 0) & (times <= 1)).all()
    s, u = annealed_times(n, progress, generator=rng(0))
    assert s.shape == u.shape == (n,)
    assert ((s >= 0) & (s <= u) & (u <= 1)).all()
    assert (u - s <= progress + 1e-6).all()  # one rounding of float32


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.4, 1.6)])
def test_logit_normal_times_have_normal_log_odds(mean, std):
    """One time: its log-odds are N(mean, std²). Two: the smaller has 1 − (1−F)² for its CDF, the larger F².

    Kolmogorov–Smirnov at 1e-6; a mean off by 0.1 and a variance in place of the deviation are refused.
    """
    n = 20_000
    odds = logit(logit_normal_times(n, 1, mean=mean, std=std, generator=rng(0))[0].double().numpy())
    assert stats.kstest(odds, stats.norm(mean, std).cdf).pvalue > 1e-6
    for wrong in (stats.norm(mean + 0.1, std), stats.norm(mean, std**2 if std != 1 else 0.9)):
        assert stats.kstest(odds, wrong.cdf).pvalue < 1e-6
    pair = logit_normal_times(n, mean=mean, std=std, generator=rng(0)).double().numpy()
    first, second = stats.norm(mean, std).cdf(logit(pair))
    assert stats.kstest(1 - (1 - first) ** 2, "uniform").pvalue > 1e-6
    assert stats.kstest(second**2, "uniform").pvalue > 1e-6
    assert stats.kstest(second, "uniform").pvalue < 1e-6


@pytest.mark.parametrize("progress", [0.05, 0.5, 1.0])
def test_annealed_gaps_are_those_of_two_uniforms_scaled(progress):
    """(u−s)/progress has the CDF 1 − (1−g)², and s/(1 − (u−s)) is uniform and independent of it: at progress 1, the
    ordered pair of two uniforms. Kolmogorov–Smirnov at 1e-6, the product of the two in standard errors, 6e-7; gaps
    that were uniform, or a start uniform on [0, 1] (for gaps that are not small), are refused."""
    s, u = annealed_times(20_000, progress, generator=rng(0)).double()
    gap = (u - s) / progress
    share, rank = s / (1 - (u - s)), 1 - (1 - gap) ** 2
    assert stats.kstest(rank.numpy(), "uniform").pvalue > 1e-6
    assert stats.kstest(share.numpy(), "uniform").pvalue > 1e-6
    assert abs(z_scores((share - 0.5) * (rank - 0.5), 0.0)) < LIMIT
    assert stats.kstest(gap.numpy(), "uniform").pvalue < 1e-6
    assert progress < 0.5 or stats.kstest(s.numpy(), "uniform").pvalue < 1e-6
    if progress == 1:
        assert stats.kstest(1 - (1 - s.numpy()) ** 2, "uniform").pvalue > 1e-6
        assert stats.kstest(u.numpy() ** 2, "uniform").pvalue > 1e-6


def test_annealed_times_begin_on_the_diagonal():
    s, u = annealed_times(1_000, 0.0, generator=rng(0))
    assert torch.equal(s, u)
    assert stats.kstest(s.numpy(), "uniform").pvalue > 1e-6


@pytest.mark.parametrize("rates", [{}, {"start_rate": 0.25, "end_rate": 0.0}, {"start_rate": 0.2, "end_rate": 0.5}])
def test_balanced_times_are_uniform_in_angle(rates):
    """θ = atan2(s c, 1−s), in units of its largest value (0.98 of π/2 for s, π/2 for u): an ordered pair of uniforms,
    or one uniform where the other is at an end. Rates of the ends in standard errors (6e-7), laws by
    Kolmogorov–Smirnov at 1e-6; exchanged rates, uniform times and a lone end's partner drawn from a pair are refused.
    """
    n = 20_000
    start_rate, end_rate = rates.get("start_rate", 0.0), rates.get("end_rate", 0.25)
    t = context_time(n, generator=rng(0)).double().clamp_max(0.99)
    std = posterior_std(t, 2.0)
    s, u = balanced_times(t, std, generator=rng(1), **rates)
    assert s.dtype == torch.float64
    assert (s <= u).all()
    assert (s < 1).all()
    at_start, at_end = s == 0, u == 1
    assert not (at_start & at_end).any()
    for ends, rate, other in ((at_start, start_rate, end_rate), (at_end, end_rate, start_rate)):
        assert abs(z_scores(ends.double(), rate)) < LIMIT if rate else not ends.any()
        assert abs(z_scores(ends.double(), other)) > LIMIT if ends.any() else other > 0
    low, high = (torch.atan2(a * std, 1 - a).numpy() / (math.pi / 2) for a in (s, u))
    assert 0.96 < low.max() <= 0.98 + 1e-12
    pair, before_end, after_start = (a.numpy() for a in (~at_start & ~at_end, at_end, at_start))
    laws = [1 - (1 - low[pair] / 0.98) ** 2, high[pair] ** 2, low[before_end] / 0.98, high[after_start]]
    for law in laws:
        assert not len(law) or stats.kstest(law, "uniform").pvalue > 1e-6
    wrong = [s.numpy()[pair], u.numpy()[pair], 1 - (1 - low[before_end] / 0.98) ** 2, high[after_start] ** 2]
    for law in wrong:
        assert not len(law) or stats.kstest(law, "uniform").pvalue < 1e-6


@given(st.floats(0, 1), st.floats(1e-3, 10))
def test_angles_are_those_of_a_gaussians_rotation(s, std):
    """(Ī_s − s m)/S_s = cos θ x̄₀ + sin θ (x₁ − m)/c, and `time_of_angle` inverts `angle_of_time`."""
    s, std = torch.tensor(s, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    angle = angle_of_time(s, std)
    total = ((1 - s) ** 2 + (s * std) ** 2).sqrt()
    assert_close(total * torch.stack([angle.cos(), angle.sin()]), torch.stack([1 - s, s * std]), 1e-12, 1 + total)
    assert_close(time_of_angle(angle, std), s, 1e-9)


@given(st.floats(0, 0.98), st.floats(0, 1), st.floats(1e-2, 5), st.floats(0.01, 1.5))
def test_step_towards_moves_by_the_step_or_stops_at_u(s, share, std, step):
    """s <= w <= u; short of u the angle has grown by the step exactly."""
    s, std = torch.tensor([s], dtype=torch.float64), torch.tensor([std], dtype=torch.float64)
    u = s + share * (1 - s)
    w = step_towards(s, u, std, step)
    assert (s <= w).all()
    assert (w <= u).all()
    grown = float(angle_of_time(w, std) - angle_of_time(s, std))
    assert grown <= step + 1e-9
    if w < u:
        assert grown == pytest.approx(step, abs=1e-9)


STARTS = torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: context_time(0), "n must be an integer >= 1"),
        (lambda: context_time(3, zero_rate=1.5), r"zero_rate must lie in \[0, 1\]"),
        (lambda: context_time(3, zero_rate=math.nan), r"zero_rate must lie in \[0, 1\]"),
        (lambda: context_time(3, power=0), "power be positive"),
        (lambda: context_time(3, power=math.nan), "power be positive"),
        (lambda: ordered_times(0), "n must be an integer >= 1"),
        (lambda: ordered_times(3, 0), "count must be an integer >= 1"),
        (lambda: context_time(3, zero_rate=-0.1), r"zero_rate must lie in \[0, 1\]"),
        (lambda: logit_normal_times(0), "n must be an integer >= 1"),
        (lambda: logit_normal_times(3, 0), "count must be an integer >= 1"),
        (lambda: logit_normal_times(3, std=0.0), "std must be positive and mean finite, got 0.0"),
        (lambda: logit_normal_times(3, std=math.nan), "std must be positive and mean finite, got nan"),
        (lambda: logit_normal_times(3, mean=math.nan), "mean finite, got 1.0 and nan"),
        (lambda: annealed_times(0, 0.5), "n must be an integer >= 1"),
        (lambda: annealed_times(3, -0.1), r"progress must lie in \[0, 1\], got -0.1"),
        (lambda: annealed_times(3, 1.1), r"progress must lie in \[0, 1\], got 1.1"),
        (lambda: annealed_times(3, math.nan), r"progress must lie in \[0, 1\], got nan"),
        (lambda: balanced_times(torch.zeros(3), torch.ones(2)), "same shape"),
        (lambda: balanced_times(STARTS, STARTS + 1, start_rate=-0.1), "probabilities, got -0.1 and 0.25"),
        (lambda: balanced_times(STARTS, STARTS + 1, end_rate=-0.1), "probabilities, got 0.0 and -0.1"),
        (lambda: balanced_times(STARTS, STARTS + 1, start_rate=0.6, end_rate=0.5), "probabilities, got 0.6 and 0.5"),
        (lambda: balanced_times(STARTS, STARTS + 1, start_rate=math.nan), "probabilities, got nan"),
    ],
)
def test_laws_of_times_refuse(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_generator_decides_the_times():
    def balanced(n, generator):
        return balanced_times(torch.zeros(n), torch.ones(n), generator=generator)

    def annealed(n, generator):
        return annealed_times(n, 0.5, generator=generator)

    for law in (context_time, ordered_times, logit_normal_times, annealed, balanced):
        one, same, other = (law(20, generator=rng(k)) for k in (0, 0, 1))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
