"""Where noise comes from: one generator, or one for each row, whose numbers are then those of that row in any batch.

The noises of posterior draws: each one N(0, I), rows apart, pairs that cancel, and Sobol points that fill the space.

`LIMIT` of `helpers` bounds the statistics; the Kolmogorov–Smirnov tests raise a false alarm each with ALARM, at fixed
seeds.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.quasirandom import SobolEngine

from mfm_ref import posterior_noise
from mfm_ref.noise import normal
from tests.helpers import LIMIT, slope, z_scores
from tests.strategies import SEEDS

KINDS = ("independent", "antithetic", "sobol")
ALARM = 1e-5  # for each of some 40 tests


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal_p(values):
    """The smaller of the p-values of the values and, for their tails, of the Gaussian variance."""
    values = values.flatten().double().numpy()
    tail = stats.chi2(len(values)).cdf((values**2).sum())
    return min(stats.kstest(values, "norm").pvalue, 2 * min(tail, 1 - tail))


def errors(kind, n, f, truth, rows=4096, seed=0):
    """Of the mean of f over n noises in two dimensions, one for each row."""
    return f(posterior_noise(n, torch.zeros(rows, 2).double(), kind, generator=rng(seed))).mean(0) - truth


def smooth(eps):
    """A function of both coordinates, neither odd nor even; its mean is e^{−1/2} sin 1 + e^{1/8}."""
    return torch.sin(eps.sum(-1) / 2**0.5 + 1) + torch.exp(eps[..., 0] / 2)


SMOOTH_MEAN = math.exp(-1 / 2) * math.sin(1) + math.exp(1 / 8)


# ---- one generator, or one for each row ------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), max_size=4), SEEDS, st.sampled_from([torch.float32, torch.float64]))
def test_from_one_generator_it_is_torchs_own_stream(shape, seed, dtype):
    """To the bit, and the generator is left where torch leaves it; None is torch's default generator."""
    ours, torchs = rng(seed), rng(seed)
    for _ in range(2):
        drawn = normal(tuple(shape), torch.zeros(1, dtype=dtype), ours)
        assert torch.equal(drawn, torch.randn(shape, generator=torchs, dtype=dtype))
    torch.manual_seed(seed)
    drawn = normal(tuple(shape), torch.zeros(1, dtype=dtype), None)
    torch.manual_seed(seed)
    assert torch.equal(drawn, torch.randn(shape, dtype=dtype))


@given(st.lists(SEEDS, max_size=5), st.lists(st.integers(1, 20), max_size=2), st.integers(0, 2), st.data())
def test_a_row_is_drawn_from_its_own_generator_in_any_batch(seeds, rest, before, data):
    """The rows are those that the generators give one by one, wherever their dimension stands; so a shuffled part of
    the batch has the same rows, in two calls one after the other."""
    lead = tuple(range(2, 2 + before))  # the dimensions before that of the rows
    part = data.draw(st.permutations(range(len(seeds)))) if seeds else []
    part = part[: data.draw(st.integers(0, len(part)))]

    def two_calls(numbers):
        sources, shape = [rng(seeds[k]) for k in numbers], (*lead, len(numbers), *rest)
        return [normal(shape, torch.zeros(1).double(), sources, rows=len(lead)).movedim(len(lead), 0) for _ in range(2)]

    whole = two_calls(range(len(seeds)))
    for k, seed in enumerate(seeds):
        alone = rng(seed)
        for call in whole:
            assert torch.equal(call[k], torch.randn((*lead, *rest), generator=alone, dtype=torch.float64))
    for all_rows, some in zip(whole, two_calls(part), strict=True):
        assert some.shape == (len(part), *lead, *rest)
        assert torch.equal(some, all_rows[part])


def test_rows_of_generators_are_normal_and_independent():
    """Neighbouring seeds, as scripts give to neighbouring samples; rows of one seed are equal and fail."""
    rows = normal((20_000, 3), torch.zeros(1), [rng(k) for k in range(20_000)])
    assert normal_p(rows) > ALARM
    assert z_scores(rows[:-1] * rows[1:], 0.0).abs().max() < LIMIT
    same = normal((200, 3), torch.zeros(1), [rng(0) for _ in range(200)])
    assert z_scores(same[:-1] * same[1:], 0.0).abs().max() > LIMIT


@pytest.mark.parametrize(("rows", "needed"), [(0, 2), (1, 3), (-1, 4)])
def test_other_numbers_of_generators_are_refused(rows, needed):
    with pytest.raises(ValueError, match=f"generators must be one for each of {needed} rows, got 5"):
        normal((2, 3, 4), torch.zeros(1), [rng(k) for k in range(5)], rows=rows)


@given(
    st.sampled_from(KINDS),
    st.integers(1, 9),
    st.lists(SEEDS, min_size=1, max_size=4, unique=True),
    st.sampled_from([(3,), (2, 2)]),
    st.data(),
)
def test_noises_of_draws_are_those_of_their_row_in_any_batch(kind, n, seeds, shape, data):
    """To the bit, in two calls one after the other; what a row gets alone is what its generator gives for it alone."""
    part = data.draw(st.permutations(range(len(seeds))))[: data.draw(st.integers(1, len(seeds)))]

    def two_calls(numbers):
        sources, x = [rng(seeds[k]) for k in numbers], torch.zeros(len(numbers), *shape).double()
        return [posterior_noise(n, x, kind, generator=sources) for _ in range(2)]

    for whole, some in zip(two_calls(range(len(seeds))), two_calls(part), strict=True):
        assert some.shape == (n, len(part), *shape)
        assert torch.equal(some, whole[:, part])
    alone = posterior_noise(n, torch.zeros(1, *shape).double(), kind, generator=rng(seeds[0]))
    assert torch.equal(two_calls([0])[0], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_noises_of_draws_from_generators_of_rows_are_normal_and_rows_apart(kind):
    """Neighbouring seeds; the rows of one seed are equal, and fail."""
    x = torch.zeros(4_000, 2).double()
    eps = posterior_noise(4, x, kind, generator=[rng(k) for k in range(4_000)])
    assert min(normal_p(eps[i]) for i in range(4)) > ALARM
    assert z_scores((eps[:, :-1] * eps[:, 1:]).movedim(1, 0), 0.0).abs().max() < LIMIT
    same = posterior_noise(4, x[:200], kind, generator=[rng(0) for _ in range(200)])
    assert z_scores((same[:, :-1] * same[:, 1:]).movedim(1, 0), 0.0).abs().max() > LIMIT
    if kind == "sobol":  # each row fills the space by itself
        cells = (torch.special.ndtr(eps) * 4).long().sort(0).values
        assert torch.equal(cells, torch.arange(4).reshape(4, 1, 1).expand(4, *x.shape))


@pytest.mark.parametrize("kind", KINDS)
def test_other_numbers_of_generators_are_refused_for_draws(kind):
    with pytest.raises(ValueError, match="generators must be one for each of 3 rows, got 2"):
        posterior_noise(4, torch.zeros(3, 2), kind, generator=[rng(0), rng(1)])


# ---- the law of each noise -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 5, 8])
def test_each_noise_is_standard_normal(kind, n):
    eps = posterior_noise(n, torch.zeros(20_000, 3), kind, generator=rng(n))
    for i in range(n):
        for d in range(3):
            assert normal_p(eps[i, :, d]) > ALARM
        products = torch.stack(
            [eps[i, :, 0] * eps[i, :, 1], eps[i, :, 0] * eps[i, :, 2], eps[i, :, 1] * eps[i, :, 2]], 1
        )
        assert z_scores(products, 0.0).abs().max() < LIMIT


def test_wrong_noises_fail():
    """Unscrambled points, a shift shared by all rows, a wrong scale, and uniform numbers."""
    points = SobolEngine(1).draw(8, dtype=torch.float64)[1:]  # without the 0
    assert normal_p(torch.special.ndtri(points[2]).expand(20_000)) < ALARM
    shared = posterior_noise(8, torch.zeros(1, 1), "sobol", generator=rng()).expand(8, 20_000, 1)
    assert normal_p(shared[3]) < ALARM
    good = posterior_noise(8, torch.zeros(20_000, 1), "sobol", generator=rng())[3]
    assert normal_p(1.05 * good) < ALARM
    assert normal_p(good + 0.05) < ALARM
    assert normal_p(3.4641 * (torch.rand(20_000, generator=rng()) - 0.5)) < ALARM


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_uncorrelated_at_each_draw_and_in_their_errors(kind):
    """Over 4000 calls, that share no scrambling: the noises of two rows, and the errors of their means."""
    calls = [posterior_noise(4, torch.zeros(2, 2).double(), kind, generator=rng(seed)) for seed in range(4000)]
    eps = torch.stack(calls)  # (calls, 4, 2 rows, 2)
    products = (eps[:, :, 0, :, None] * eps[:, :, 1, None, :]).flatten(1)  # of each pair of coordinates
    across = (eps[:, :1, 0] * eps[:, 1:, 1]).flatten(1)  # and of unlike draws
    means = smooth(eps).mean(1) - SMOOTH_MEAN
    for scores in (z_scores(products, 0.0), z_scores(across, 0.0), z_scores(means[:, 0] * means[:, 1], 0.0)):
        assert scores.abs().max() < LIMIT


def test_rows_have_shifts_of_their_own():
    """Rows that shared theirs would be equal; here no two of them are, nor any two draws of a row."""
    eps = posterior_noise(16, torch.zeros(500, 1).double(), "sobol", generator=rng()).flatten()
    assert len(eps.unique()) == len(eps)


def test_draws_are_independent_where_they_should_be():
    eps = posterior_noise(4, torch.zeros(20_000, 1), "independent", generator=rng())[..., 0]
    assert z_scores(torch.stack([eps[0] * eps[1], eps[2] * eps[3]], 1), 0.0).abs().max() < LIMIT
    eps = posterior_noise(4, torch.zeros(20_000, 1), "antithetic", generator=rng())[..., 0]
    assert z_scores(torch.stack([eps[0] * eps[2], eps[1] * eps[3]], 1), 0.0).abs().max() < LIMIT


def test_a_call_differs_from_the_next_and_the_generator_decides():
    for kind in KINDS:
        x, same = torch.zeros(3, 2), rng(5)
        first, second = (posterior_noise(8, x, kind, generator=same) for _ in range(2))
        assert not torch.equal(first, second)
        posterior_noise(16, torch.ones(2, 5), kind)  # whatever was drawn in between
        assert torch.equal(first, posterior_noise(8, x, kind, generator=rng(5)))
        torch.manual_seed(3)
        first, second = (posterior_noise(8, x, kind) for _ in range(2))
        torch.manual_seed(3)
        assert torch.equal(first, posterior_noise(8, x, kind))
        assert not torch.equal(first, second)


# ---- antithetic pairs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_antithetic_pairs_cancel(n):
    eps = posterior_noise(n, torch.zeros(7, 3, 2), "antithetic", generator=rng())
    assert eps.shape == (n, 7, 3, 2)
    for i in range(0, n - 1, 2):
        assert torch.equal(eps[i], -eps[i + 1])
    magnitudes = eps[::2].abs().flatten()
    assert len(magnitudes.unique()) == len(magnitudes)  # the pairs differ, and so do the rows


# ---- Sobol points ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 8, 32])
def test_sobol_points_lie_one_in_each_interval(n):
    """n = 2^m points of one row have one coordinate in each of the n intervals of equal probability; also in pairs
    of coordinates: one point in each of n equal boxes, whatever their sides, for the first two."""
    eps = posterior_noise(n, torch.zeros(50, 6).double(), "sobol", generator=rng())
    cells = (torch.special.ndtr(eps) * n).long().sort(0).values
    assert torch.equal(cells, torch.arange(n).reshape(n, 1, 1).expand(n, 50, 6))
    u = torch.special.ndtr(eps[..., :2])
    for k in range(n.bit_length()):
        a, b = 2**k, n // 2**k
        boxes = (u[..., 0] * a).long() * b + (u[..., 1] * b).long()
        assert torch.equal(boxes.sort(0).values, torch.arange(n).reshape(n, 1).expand(n, 50))


def test_scrambling_is_more_than_a_shift():
    """The exclusive or of two points' digits is what a shift leaves alone; over the calls it takes many values."""
    cells = [
        (torch.special.ndtr(posterior_noise(4, torch.zeros(1, 2).double(), "sobol", generator=rng(s))) * 2**12).long()
        for s in range(50)
    ]
    assert len({int((c[0] ^ c[3])[0, 1]) for c in cells}) > 40


def test_error_of_sobol_means_falls_faster():
    """RMS over 4096 rows: as n^{−1/2} for independent noises, and steeper than n^{−1} for a smooth function."""
    counts = [2, 4, 8, 16, 32, 64, 128]
    rms = {kind: [float(errors(kind, n, smooth, SMOOTH_MEAN).square().mean().sqrt()) for n in counts] for kind in KINDS}
    assert slope(counts, rms["independent"]) == pytest.approx(-0.5, abs=0.03)
    assert slope(counts, rms["antithetic"]) == pytest.approx(-0.5, abs=0.03)
    assert -1.6 < slope(counts, rms["sobol"]) < -1.0
    assert all(a < b for a, b in zip(rms["sobol"], rms["independent"], strict=True))


@pytest.mark.parametrize("n", [2, 3, 7, 16, 33])
def test_sobol_means_are_unbiased_and_no_worse_for_any_n(n):
    """Of a step as of a smooth function; over calls, as rows share a scrambling."""
    for f, truth in ((smooth, SMOOTH_MEAN), (lambda eps: (eps[..., 0] + eps[..., 1] > 1).double(), 0.23975)):
        found = torch.stack([errors("sobol", n, f, truth, rows=64, seed=seed).mean() for seed in range(200)])
        assert z_scores(found, 0.0).abs() < LIMIT
        spread = [errors(kind, n, f, truth).square().mean().sqrt() for kind in ("sobol", "independent")]
        assert spread[0] < spread[1]


def test_errors_of_functions_of_a_sum_of_many_coordinates():
    """500 of them, in units of the RMS error of independent draws. An even function suffers most: pairs of Sobol
    points lie in like or opposite halves of every coordinate, which correlates their sums by ±2/π, or nearly."""
    even, neither = (
        (lambda s: torch.cos(s) - math.exp(-0.5)),
        (lambda s: torch.sin(s + 1) - math.exp(-0.5) * math.sin(1)),
    )
    rms = {}
    for kind in KINDS:
        sums = torch.cat(
            [posterior_noise(8, torch.zeros(1000, 500), kind, generator=rng(k)).sum(-1) for k in range(4)], 1
        )
        rms[kind] = [float(f(sums / 500**0.5).mean(0).square().mean().sqrt()) for f in (even, neither)]
    ratios = {kind: [a / b for a, b in zip(rms[kind], rms["independent"], strict=True)] for kind in KINDS}
    assert ratios["antithetic"][0] == pytest.approx(2**0.5, rel=0.05)
    assert ratios["sobol"][0] == pytest.approx((1 + (2 / math.pi) ** 2) ** 0.5, rel=0.05)
    assert ratios["sobol"][1] < 1 < ratios["antithetic"][1]


# ---- shapes, dtypes, ends --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (1, 2), (4, 1, 1), (5, 2, 3, 4)])
def test_shape_and_dtype(kind, dtype, shape):
    for n in (1, 2, 9):
        eps = posterior_noise(n, torch.zeros(shape, dtype=dtype), kind, generator=rng())
        assert eps.shape == (n, *shape) and eps.dtype == dtype and not eps.requires_grad


def test_coordinates_beyond_the_sequence_are_normal_too():
    eps = posterior_noise(8, torch.zeros(2, 22_000), "sobol", generator=rng())
    assert eps.shape == (8, 2, 22_000)
    assert normal_p(eps[..., SobolEngine.MAXDIM :]) > ALARM
    inside = eps[..., : SobolEngine.MAXDIM].sum(0)  # evenly spread, so they nearly cancel
    outside = eps[..., SobolEngine.MAXDIM :].sum(0)
    assert inside.std() < 1 < outside.std()
    assert posterior_noise(2, torch.zeros(1, 11_000, 2), "sobol", generator=rng()).shape == (2, 1, 11_000, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_always_finite(dtype, monkeypatch):
    """Also where every random digit is the lowest or the highest one."""
    for digit in (lambda high: 0, lambda high: high - 1):

        def constant(high, size, *, digit=digit, dtype=torch.int64, **_):
            return torch.full(tuple(size), digit(high), dtype=dtype)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", constant)
            eps = posterior_noise(4, torch.zeros(3, 2, dtype=dtype), "sobol")
        assert bool(torch.isfinite(eps).all()) and eps.abs().max() > 5


def test_what_is_wrong_is_named():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"n must be an integer >= 1, got 0"):
        posterior_noise(0, x)
    with pytest.raises(ValueError, match=r'noise must be "independent", "antithetic" or "sobol", got \'halton\''):
        posterior_noise(2, x, "halton")


def test_what_later_calls_read_is_never_written_to():
    """The unscrambled points are kept: a result changed in place changes no other."""
    x = torch.zeros(3, 2)
    first = posterior_noise(8, x, generator=rng())
    again = posterior_noise(8, x, generator=rng()).zero_()
    assert not again.any() and torch.equal(first, posterior_noise(8, x, generator=rng()))
