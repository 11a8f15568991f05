"""E1, E2, E6, E9 and E12: the algebra between the noisy state, its drift, its denoiser and its score."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mfm_ref import (
    GaussianMixture,
    coupled_interpolants,
    denoiser_to_drift,
    denoiser_to_score,
    drift_to_denoiser,
    drift_to_score,
    glass_drift,
    interpolate,
    noise_scale,
    score_to_denoiser,
    score_to_drift,
)
from tests.strategies import (
    ENDS,
    INTERIOR,
    SEEDS,
    Case,
    assert_close,
    batch_times,
    cases,
    column,
    randn,
    random_mixture,
    rng,
    row_scale,
)

# Rounding is about 1e-16 of a state, and interior times lie in [0.01, 0.99]: one division by t or 1−t costs a factor
# of 100, and E2 has at most two.
EXACT = 1e-9

# Conversions that divide by 1−t exist up to t < 1, those that divide by t from t > 0 on.
BEFORE_ONE = st.just(0.0) | INTERIOR
AFTER_ZERO = st.just(1.0) | INTERIOR


# ---- E1 ------------------------------------------------------------------------------------------------


@given(cases(t=ENDS))
def test_noise_is_at_zero_and_data_at_one(case: Case):
    noise = randn(*case.x1.shape, seed=case.seed + 1)
    data_rows = (case.t == 1).expand(case.size)
    state = interpolate(noise, case.x1, case.t)
    assert torch.equal(state[data_rows], case.x1[data_rows])
    assert torch.equal(state[~data_rows], noise[~data_rows])


@given(st.data(), st.integers(1, 6), SEEDS)
def test_velocity_points_from_noise_to_data(data, size, seed):
    x0, x1 = randn(2, size, 3, seed=seed)
    t = data.draw(batch_times(size))
    _, velocity = torch.func.jvp(lambda t: interpolate(x0, x1, t), (t,), (torch.ones_like(t),))
    assert_close(velocity, x1 - x0, 1e-14)  # linear in t: rounding only


def test_time_follows_the_batch_and_not_the_features():
    # B = D: a time broadcast along the features has the right shape and is wrong.
    t = torch.tensor([0.0, 0.5, 1.0])
    state = interpolate(torch.zeros(3, 3), torch.ones(3, 3), t)
    assert torch.equal(state, t.unsqueeze(-1).expand(3, 3))
    images = interpolate(torch.zeros(3, 3, 3, 3), torch.ones(3, 3, 3, 3), t)
    assert torch.equal(images, t.view(3, 1, 1, 1).expand(3, 3, 3, 3))


# ---- E2 ------------------------------------------------------------------------------------------------


@given(cases(t=INTERIOR))
def test_conversions_are_inverse_to_each_other(case: Case):
    t, x = case.t, case.x
    b = randn(*x.shape, seed=case.seed + 1)  # algebra: holds for any vector, not only for a drift
    denoised, score = drift_to_denoiser(b, t, x), drift_to_score(b, t, x)
    scale = row_scale(x, b) / column(t.minimum(1 - t))  # the size of the terms that cancel
    assert_close(denoiser_to_drift(denoised, t, x), b, EXACT, scale)
    assert_close(score_to_drift(score, t, x), b, EXACT, scale)
    assert_close(score_to_denoiser(score, t, x), denoised, EXACT, scale)
    assert_close(denoiser_to_score(denoised, t, x), score, EXACT, scale / column(1 - t))


@given(cases(t=BEFORE_ONE))
def test_conversions_agree_with_the_mixture_before_one(case: Case):
    p1, t, x = case.p1, case.t, case.x
    b, denoised, score = p1.drift(t, x), p1.denoiser(t, x), p1.score(t, x)
    scale = row_scale(x, b) / column(1 - t)
    assert_close(denoiser_to_drift(denoised, t, x), b, EXACT, scale)
    assert_close(drift_to_score(b, t, x), score, EXACT, scale)
    assert_close(denoiser_to_score(denoised, t, x), score, EXACT, scale / column(1 - t))


@given(cases(t=AFTER_ZERO))
def test_conversions_agree_with_the_mixture_after_zero(case: Case):
    p1, t, x = case.p1, case.t, case.x
    b, denoised, score = p1.drift(t, x), p1.denoiser(t, x), p1.score(t, x)
    scale = row_scale(x, b, score) / column(t)
    assert_close(score_to_drift(score, t, x), b, EXACT, scale)
    assert_close(score_to_denoiser(score, t, x), denoised, EXACT, scale)


@given(cases())
def test_drift_gives_the_denoiser_at_every_time(case: Case):
    b = case.p1.drift(case.t, case.x)
    denoised = case.p1.denoiser(case.t, case.x)
    assert_close(drift_to_denoiser(b, case.t, case.x), denoised, EXACT, row_scale(case.x, b))


@pytest.mark.parametrize(
    ("convert", "end"),
    [
        (drift_to_score, 1.0),
        (denoiser_to_drift, 1.0),
        (denoiser_to_score, 1.0),
        (score_to_drift, 0.0),
        (score_to_denoiser, 0.0),
    ],
)
def test_a_conversion_refuses_the_end_where_it_divides_by_zero(convert, end):
    x = torch.ones(2, 3)
    assert torch.isfinite(convert(x, 1 - end, x)).all()
    with pytest.raises(ValueError, match=f"{convert.__name__} needs t"):
        convert(x, torch.tensor([0.5, end]), x)  # one such row is enough


# ---- E6 ------------------------------------------------------------------------------------------------


@given(cases(t=AFTER_ZERO))
def test_both_forms_of_the_sde_drift_agree(case: Case):
    p1, t, x = case.p1, case.t, case.x
    b, score = p1.drift(t, x), p1.score(t, x)
    half = column(noise_scale(t) / 2)
    assert_close(b + half * score, 2 * b - x / column(t), EXACT, row_scale(x, b, score) / column(t))


@given(INTERIOR, SEEDS)
def test_noise_scale_keeps_the_variance_of_the_marginal(t, seed):
    # Of a Gaussian p₁ the SDE's variance obeys v' = 2 A v + σ², with A the slope of its drift 2b − x/t.
    p1, time = random_mixture(1, 1, seed), torch.tensor(t, dtype=torch.float64)
    variance, growth = torch.func.jvp(lambda t: p1.marginal(t).cov, (time,), (torch.ones_like(time),))
    x = randn(1, 1, seed=seed)
    _, slope = torch.func.jvp(lambda x: 2 * p1.drift(t, x) - x / t, (x,), (torch.ones_like(x),))
    assert_close(2 * slope * variance + noise_scale(t), growth, EXACT, 1 / t)


def test_noise_scale_at_plain_times():
    assert noise_scale(1.0) == 0
    # A number keeps double precision: 0.1 in float32 would be off by 1e-8.
    assert noise_scale(0.1).item() == pytest.approx(18, rel=1e-15)
    assert torch.equal(noise_scale(torch.tensor([0.5, 1.0])), torch.tensor([2.0, 0.0]))
    with pytest.raises(ValueError, match="needs t > 0"):
        noise_scale(torch.tensor([0.5, 0.0]))


# ---- E9, E13 -------------------------------------------------------------------------------------------

# Twelve two-sided comparisons in standard errors, each beyond 5.5 with probability 4e-8: one false alarm in two
# million sets of draws.
STANDARD_ERRORS = 5.5


def noises_look_right(x1, s, t, x, z, velocity) -> bool:
    """Whether both noises have the moments of N(0, 1) and are uncorrelated with each other and with the data."""
    context_noise, noise = (x - t * x1) / (1 - t), (z - s * x1) / (1 - s)
    if not torch.allclose(velocity, x1 - noise, rtol=0, atol=1e-12):
        return False
    n = len(x1)
    data = (x1 - x1.mean()) / x1.std()
    statistics = []
    for a in (context_noise, noise):
        statistics += [a.mean(0), (a * data).mean(0), (a**2 - 1).mean(0) / 2**0.5, (a**3).mean(0) / 15**0.5]
    statistics.append((context_noise * noise).mean(0))
    return bool((torch.stack(statistics).abs() * n**0.5 < STANDARD_ERRORS).all())


def test_the_two_views_of_one_clean_sample():
    x1, s, t = randn(100_000, 1, seed=0), 0.3, 0.6
    x, z, velocity = coupled_interpolants(x1, s, t, generator=rng(1))
    assert noises_look_right(x1, s, t, x, z, velocity)
    # Wrong samplers: one noise for both views; the views exchanged; the velocity of the other view.
    shared = (x - t * x1) / (1 - t)
    assert not noises_look_right(x1, s, t, x, interpolate(shared, x1, s), x1 - shared)
    assert not noises_look_right(x1, s, t, z, x, velocity)
    assert not noises_look_right(x1, s, t, x, z, x1 - shared)


def test_draws_follow_the_generator():
    x1 = randn(4, 3, seed=0)
    first, again, other = (coupled_interpolants(x1, 0.3, 0.6, generator=rng(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# ---- E12 -----------------------------------------------------------------------------------------------


@given(cases())
def test_glass_drift_is_the_drift_of_the_posterior(case: Case):
    p1, s, z, t, x = case.p1, case.s, case.z, case.t, case.x
    expected = p1.posterior(t, x).drift(s, z)
    assert_close(glass_drift(p1.drift, s, z, t, x), expected, EXACT, row_scale(x, z, expected))


@given(cases(s=BEFORE_ONE, t=BEFORE_ONE))
def test_glass_drift_away_from_the_path(case: Case):
    # z and x that no clean sample explains, as a coarse solver meets them.
    p1, s, t, x = case.p1, case.s, case.t, case.x
    z = 5 * randn(*x.shape, seed=case.seed + 1)
    expected = p1.posterior(t, x).drift(s, z)
    assert_close(glass_drift(p1.drift, s, z, t, x), expected, EXACT, row_scale(x, z, expected))


@st.composite
def next_to_an_end(draw) -> float:
    """10^-k from 0, or from 1."""
    if draw(st.booleans()):
        return 10.0 ** -draw(st.integers(1, 200))
    return 1 - 10.0 ** -draw(st.integers(1, 12))


@given(cases(s=next_to_an_end(), t=next_to_an_end()))
def test_glass_drift_next_to_the_ends(case: Case):
    # The drift holds (x − z)/(1−s), so the last bit of z alone moves it by 1e-16/(1−s); it may lose little more.
    p1, s, z, t, x = case.p1, case.s, case.z, case.t, case.x
    expected = p1.posterior(t, x).drift(s, z)
    assert_close(glass_drift(p1.drift, s, z, t, x), expected, 1e-13, row_scale(x, z) / column(1 - s))


@given(cases(s=ENDS, t=ENDS))
def test_glass_drift_at_the_four_corners(case: Case):
    p1, s, z, t, x = case.p1, case.s, case.z, case.t, case.x
    drift = glass_drift(p1.drift, s, z, t, x)
    for row in range(case.size):
        match float(s.expand(case.size)[row]), float(t.expand(case.size)[row]):
            case 0.0, 0.0:  # nothing known: the mean of the data minus the noise
                expected = p1.mean - z[row]
            case 0.0, 1.0:  # the context is the clean sample
                expected = x[row] - z[row]
            case _:  # z is the clean sample: the noise it left behind has mean zero
                expected = z[row]
        assert_close(drift[row], expected, 1e-13, row_scale(x, z)[row])


class Blobs:
    """Two classes of images, each with independent Gaussian pixels: an elementwise drift that reads a label."""

    def __init__(self, shape: tuple[int, ...], seed: int):
        self.means = randn(2, *shape, seed=seed)
        self.variances = randn(2, *shape, seed=seed + 1).exp()

    def drift(self, t, x, y):
        t = t.view(-1, *[1] * (x.ndim - 1))
        mean, var = self.means[y], self.variances[y]
        return mean + (t * var - (1 - t)) / (t**2 * var + (1 - t) ** 2) * (x - t * mean)

    def mixture(self, y: int) -> GaussianMixture:
        weight = torch.ones(1, dtype=torch.float64)
        return GaussianMixture(weight, self.means[y].reshape(1, -1), self.variances[y].flatten().diag().unsqueeze(0))


@given(st.data(), st.sampled_from([(2,), (2, 2), (1, 2, 2)]), SEEDS)
def test_glass_drift_with_labels_and_any_state_shape(data, shape, seed):
    size = 2  # the extent of an image, too
    blobs, labels = Blobs(shape, seed), torch.tensor([1, 0])
    s, t = data.draw(batch_times(size, BEFORE_ONE)), data.draw(batch_times(size, BEFORE_ONE))
    z, x = randn(2, size, *shape, seed=seed + 2)
    drift = glass_drift(blobs.drift, s, z, t, x, labels)
    for row, y in enumerate(labels.tolist()):
        s_row, t_row = s.expand(size)[row], t.expand(size)[row]
        posterior = blobs.mixture(y).posterior(t_row, x[row].reshape(1, -1))
        expected = posterior.drift(s_row, z[row].reshape(1, -1)).reshape(shape)
        assert_close(drift[row], expected, EXACT, 1 + expected.abs().max())


@given(cases())
def test_glass_drift_in_single_precision(case: Case):
    # At the ends, and from 0.01 to 0.99 between them. Closer to s = 1, (x − z)/(1−s) magnifies rounding beyond 1e-4.
    p1, s, z, t, x = case.p1, case.s, case.z, case.t, case.x
    expected = glass_drift(p1.drift, s, z, t, x)
    single = glass_drift(p1.to(torch.float32).drift, s.float(), z.float(), t.float(), x.float())
    assert single.dtype == torch.float32
    assert_close(single.double(), expected, 1e-4, row_scale(x, z, expected))
